"""Test the documentation against the program: references are current, commands parse, help fits the terminal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from docs.reference import HERE, PACKAGE, package_tree, pages, verbs
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from csr_vlm.cli.app import app
from csr_vlm.config.load import load_config, option_keys
from csr_vlm.core.errors import CsrError
from tests.docs_blocks import GENERATED, PAGES, ROOT, Block, blocks, invocations

COMMANDS = [
    pytest.param(arguments, id=f"{page.name}-{block.number}-{number}")
    for page in PAGES
    for block in blocks(page)
    if block.is_shell
    for number, (line, _) in enumerate(block.lines())
    if re.search(r"(^|\s)csr ", line) and line.count("'") % 2 == 0
    for arguments in invocations(line)
]
INLINE = re.compile(r"`csr ((?:[a-z-]+ ?)+)")
USAGE = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""Every error about how a command is written."""


def parsed(arguments: list[str]) -> list[Any]:
    """Parse as the program would, without running anything; returns the contexts, the innermost last."""
    command: Any = get_command(app)
    contexts = [command.make_context("csr", list(arguments))]
    while isinstance(command, TyperGroup):
        rest = [*contexts[-1]._protected_args, *contexts[-1].args]
        name, command, rest = command.resolve_command(contexts[-1], rest)
        contexts.append(command.make_context(name, rest, parent=contexts[-1]))
    return contexts


def examples() -> list[Any]:
    """One parameter a verb: its words and the example of its help."""
    found = []
    for words in verbs():
        command: Any = get_command(app)
        for word in words:
            command = command.commands[word]
        if not isinstance(command, TyperGroup):
            found.append(pytest.param(words, command, id=" ".join(words)))
    return found


@pytest.fixture(scope="module")
def reference() -> dict[str, str]:
    return pages()


@pytest.mark.parametrize("name", ["architecture.md", "configuration.md", "commands.md", "presets.md"])
def test_the_reference_is_current(reference, name):
    written = (HERE / name).read_text(encoding="utf-8")
    assert written == reference[name], "run: make docs-pages"


def test_the_architecture_page_describes_every_module():
    tree = package_tree((HERE / "architecture.md").read_text(encoding="utf-8"))
    described = {line.split()[0] for line in tree.splitlines() if len(line.split()) > 1}
    modules = {path.name for path in PACKAGE.rglob("*.py") if not path.name.startswith("__")}
    assert modules
    assert modules <= described


def test_the_reference_has_every_key_and_verb():
    configuration = (HERE / "configuration.md").read_text(encoding="utf-8")
    assert all(f"| `{key}` |" in configuration for key in option_keys())
    commands = (HERE / "commands.md").read_text(encoding="utf-8")
    assert all(f"\n## {' '.join(['csr', *words])}\n" in commands for words in verbs())


@pytest.mark.parametrize(("words", "command"), examples())
def test_every_verb_has_an_example_of_itself_that_parses(words, command):
    assert command.epilog, f"csr {' '.join(words)} has no example"
    _, _, example = command.epilog.partition("\n  ")
    found = list(invocations(example))
    own = [arguments for arguments in found if arguments[: len(words)] == words or words == ["eval", "run"]]
    assert own, f"{example!r} is no example of csr {' '.join(words)}"
    for arguments in found:
        parsed(arguments)


@pytest.mark.parametrize("words", verbs(), ids=lambda words: "-".join(words) or "csr")
def test_every_help_fits_80_columns(words):
    shown = CliRunner().invoke(app, [*words, "--help"], prog_name="csr", env={"COLUMNS": "80"}).stdout
    assert max(map(len, shown.splitlines())) <= 80
    command: Any = get_command(app)
    for word in words:
        command = command.commands[word]
    if isinstance(command, TyperGroup):
        for name, verb in command.commands.items():
            summary = verb.get_short_help_str(1000)
            assert not summary.endswith("...")
            assert re.search(rf"^  {name} +{re.escape(summary)}$", shown, re.MULTILINE), f"the summary of {name} is cut"


def test_verbs_are_grouped_by_what_one_wants():
    shown = CliRunner().invoke(app, ["--help"], prog_name="csr", env={"COLUMNS": "80"}).stdout
    titles = re.findall(r"^(\w+):$", shown, re.MULTILINE)
    assert titles == ["Options", "Run", "Inspect", "Evaluate", "Share", "Advanced"]


def test_version_is_printed_by_option_and_verb():
    from importlib.metadata import version

    expected = f"csr-vlm {version('csr-vlm')}\n"
    assert [CliRunner().invoke(app, [word]).stdout for word in ("--version", "version")] == [expected] * 2


@pytest.mark.parametrize("words", [[], ["run"], ["eval"], ["eval", "chair"]], ids=" ".join)
def test_help_is_that_of_the_verb(words):
    runner = CliRunner()
    expected = runner.invoke(app, [*words, "--help"], prog_name="csr").stdout
    assert runner.invoke(app, ["help", *words], prog_name="csr").stdout == expected


def test_help_of_an_unknown_verb_is_an_error():
    with pytest.raises(USAGE, match="runn"):
        CliRunner().invoke(app, ["help", "runn"], catch_exceptions=False, standalone_mode=False)
    with pytest.raises(CsrError, match="csr run has no verb 'fast'"):
        CliRunner().invoke(app, ["help", "run", "fast"], prog_name="csr", catch_exceptions=False)


@pytest.mark.parametrize("arguments", COMMANDS)
def test_every_printed_command_parses(arguments):
    if arguments[-1] in {"--help", "--install-completion"}:
        assert arguments[:-1] in verbs()
        return
    contexts = parsed(arguments)
    given = contexts[-1].params
    for name in ("target", "overrides", "axes"):
        values = given.get(name) or []
        for value in [values] if isinstance(values, str | Path) else values:
            check_setting(str(value))
    target = str(given.get("target") or "")
    if target.startswith("recipes/"):
        assert (ROOT / target).is_file()
        load_config(ROOT / target, given.get("overrides") or ())


def check_setting(word: str) -> None:
    key, separator, _ = word.partition("=")
    if separator:
        assert key in option_keys() or key.startswith("training.trl."), f"there is no option {key}"


def test_some_commands_are_there():
    assert len(COMMANDS) > 40


@pytest.mark.parametrize(
    "arguments",
    [["runn", "x"], ["run"], ["run", "x", "--outt", "y"], ["eval", "chiar"], ["show", "r", "--iteration", "0"]],
)
def test_a_wrong_command_would_be_noticed(arguments):
    with pytest.raises((CsrError, USAGE)):
        parsed(arguments)


def test_a_wrong_key_would_be_noticed():
    with pytest.raises(AssertionError, match="no option"):
        check_setting("method.lamda=1")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_inline_commands_name_verbs(page):
    if page.name in GENERATED:
        return
    known = {" ".join(words) for words in verbs()}
    for found in INLINE.findall(page.read_text(encoding="utf-8")):
        first = found.split()[0]
        if first.startswith("-"):
            continue
        assert first in known, f"csr {first} in {page.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_python(page):
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, f"{page.name} {block.number}", "exec")


def test_every_page_is_in_the_menu():
    class Loader(yaml.SafeLoader):
        pass

    written = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    listed = re.findall(r"[\w./-]+\.md", str(written["nav"]))
    assert {str(page.relative_to(HERE)) for page in PAGES if page.parent == HERE} <= set(listed)


def test_a_note_holds_for_its_line_or_for_what_follows():
    block = Block(Path("p.md"), 0, "console", "csr a   # needs a GPU\ncsr b\n# needs the network\ncsr c\n")
    assert [noted for _, noted in block.lines()] == [True, False, True]


def test_the_messages_of_the_faq_are_the_programs() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    messages = re.findall(r"^\| `([^`]+)` \|", (HERE / "faq.md").read_text(encoding="utf-8"), re.MULTILINE)
    pieces = [piece.strip(" :,") for message in messages for piece in message.split("…")]
    assert len(messages) > 10
    assert [piece for piece in pieces if piece not in source] == []
