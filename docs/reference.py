"""Write the pages that follow from the code: ``python -m docs.reference``; a test checks that they are current."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from tests.exchange_rows import OTHERS, OTHERS_OF_THEIR_OWN
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from csr_vlm.cli.app import app
from csr_vlm.config.load import fields_of, load_config, section_of
from csr_vlm.config.schema import RunConfig, presets, size_classes
from csr_vlm.data.rows import unpacked
from csr_vlm.data.sources import PAIR_FORMATS, PAIR_READERS

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "src" / "csr_vlm"
_ABOUT_CONFIGURATION = """\
A recipe is a YAML file with these options. `key=value` arguments on the command line override it, as in
`csr run recipes/llava-1.5-7b.yaml method.lambda=0.7 data.limit=1000`. Values are YAML. Options that the recipe does not
set come from its `preset`, then from the defaults listed here. Unknown keys are refused, with the nearest valid key.
`csr check RECIPE --config` prints the resolved configuration. `csr recipes` lists the recipes that come with the
package: `csr run llava-1.5-7b` works from any folder, and `csr recipes llava-1.5-7b` copies the file to change it.
"""
_ABOUT_COMMANDS = """\
Results go to stdout; progress, warnings and next steps go to stderr. `--quiet`, `--verbose`, `--json`,
`--no-color` (or the environment variable `NO_COLOR`) and `--debug` work before and after the command. With `--json`,
stdout is one JSON document; commands that write files list them under `written`. An error has up to three lines:
`error:` says what went wrong, `why:` gives the reason, and `hint:` says what to do.

For tab completion, run `csr --install-completion` once (bash, zsh, fish, PowerShell). It completes commands, options,
recipes, runs and configuration keys.
"""
_NOTE = "<!-- Written by `python -m docs.reference`; do not edit. -->"
_MARKS = re.compile(r"(<!-- table: begin -->\n).*(<!-- table: end -->)", re.DOTALL)
_SIZE_MARKS = re.compile(r"(<!-- sizes: begin -->\n).*(<!-- sizes: end -->)", re.DOTALL)
_OTHERS_MARKS = re.compile(r"(<!-- pairs of others: begin -->\n).*(<!-- pairs of others: end -->)", re.DOTALL)
_PAIR_MARKS = re.compile(r"(<!-- pair formats: begin -->\n).*(<!-- pair formats: end -->)", re.DOTALL)
_TREE_MARKS = re.compile(r"(<!-- package tree: begin -->\n).*(<!-- package tree: end -->)", re.DOTALL)
_COMPARED = ("paper", "official", "calibrated")
_NEEDED = {"model": {"path": "model-2m"}, "scorer": {"path": "S"}, "data": {"prompts": "P", "pairs": "Q"}}


def pages() -> dict[str, str]:
    """Map the name of every page that is written here to its text."""
    around = (HERE / "presets.md").read_text(encoding="utf-8")
    table, sizes = preset_table(), size_table()
    architecture = (HERE / "architecture.md").read_text(encoding="utf-8")
    tree = package_tree(architecture)
    return {
        "architecture.md": _TREE_MARKS.sub(lambda found: found[1] + tree + found[2], architecture),
        "configuration.md": configuration(),
        "commands.md": commands(),
        "data.md": data(),
        "presets.md": _SIZE_MARKS.sub(
            lambda found: found[1] + sizes + found[2], _MARKS.sub(lambda found: found[1] + table + found[2], around)
        ),
    }


_TRAINERS = {
    "trl": ("TRL", "trl", "constraints.txt"),
    "llamafactory": ("LLaMA-Factory", "llamafactory", "constraints-llamafactory.txt"),
    "swift": ("ms-swift", "ms_swift", "constraints-swift.txt"),
}
"""Program, package and constraints of the trainers in which ``make test-exports`` trains an export."""


def pair_table() -> str:
    """Write the table of pair formats: read, written, how pairs that go on are held, and trained elsewhere."""
    rows = [
        "| format | read by `data.pairs` | written by `csr export` | responses that go on | two steps trained in |",
        "|---|---|---|---|---|",
    ]
    for name, module in PAIR_READERS.items():
        goes_on = "by a request in the prompt" if getattr(module, "ENDS_EVERY_RESPONSE", False) else "exactly"
        written = name in PAIR_FORMATS
        cells = [f"`{name}`", "yes", "yes" if written else "no", goes_on if written else "-", _trainer_of(name)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, ""])


def _trainer_of(name: str) -> str:
    if name not in _TRAINERS:
        return "-"
    program, package, constraints = _TRAINERS[name]
    pinned = (HERE.parent / constraints).read_text(encoding="utf-8")
    version = re.search(rf"^{package}==(\S+)$", pinned, re.MULTILINE)
    assert version is not None
    return f"{program} {version[1]}"


def data() -> str:
    """Fill the tables of the page about data."""
    page = (HERE / "data.md").read_text(encoding="utf-8")
    page = _PAIR_MARKS.sub(lambda found: found[1] + pair_table() + found[2], page)
    return _OTHERS_MARKS.sub(lambda found: found[1] + others_table() + found[2], page)


def others_table() -> str:
    """Write the table of other programs' pairs, from the rows that the tests read."""
    rows = ["| rows of | fields besides the id | read as |", "|---|---|---|"]
    for name, row in {**OTHERS, **OTHERS_OF_THEIR_OWN}.items():
        reader = next(form for form, module in PAIR_READERS.items() if module.responses(unpacked(row)) is not None)
        rows.append(f"| {name} | {', '.join(f'`{field}`' for field in row)} | `{reader}` |")
    return "\n".join([*rows, ""])


def package_tree(page: str) -> str:
    """List every file of the package in import order, one line a file.

    Args:
        page: The architecture page. Its descriptions are kept; a file without one gets the
            first line of its docstring.
    """
    old = _TREE_MARKS.search(page)
    described: dict[str, str] = {}
    folder = ""
    for line in old[0].splitlines() if old else ():
        if entry := re.fullmatch(r"( *)(\S+)(?: {2,}(.*))?", line):
            depth, name = len(entry[1]) // 2, entry[2]
            folder = "/".join([*folder.split("/")[: depth - 1], ""]) if depth > 1 else ""
            described[folder + name] = entry[3] or ""
            folder += name if name.endswith("/") else ""
    lines = ["src/csr_vlm/"]
    for path in _package_files(page):
        name = path.relative_to(PACKAGE).as_posix() + ("/" if path.is_dir() else "")
        label = (
            "  " * len(path.relative_to(PACKAGE).parts)
            + name.rstrip("/").split("/")[-1]
            + name[len(name.rstrip("/")) :]
        )
        lines.append(f"{label:30}  {described.get(name) or _first_line(path)}".rstrip())
    return "\n".join(["```text", *lines, "```", ""])


def _package_files(page: str) -> Iterator[Path]:
    """Yield folders and files, the folders in import order, without ``__init__.py`` and data below ``assets``."""
    order = re.findall(r"\w+", page.split("<!-- import order -->")[1].split("```")[1].removeprefix("text"))
    for name in order:
        if (PACKAGE / f"{name}.py").is_file():
            yield PACKAGE / f"{name}.py"
        else:
            yield from _folder_files(PACKAGE / name)


def _folder_files(folder: Path) -> Iterator[Path]:
    yield folder
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.is_dir() and path.name not in {"assets", "lexicons", "recipes", "__pycache__"}:
            yield from _folder_files(path)
        elif path.suffix in {".py", ".yaml"} and path.name not in {"__init__.py", "__main__.py"}:
            yield path


def _first_line(path: Path) -> str:
    """Return the first line of a module's docstring; of a folder, its ``__init__.py``'s."""
    source = path / "__init__.py" if path.is_dir() else path
    if source.suffix != ".py":
        return ""
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    line = re.sub(r":\w+:|`", "", docstring.partition("\n")[0]).rstrip(".")
    return line if line[1:2].isupper() else line[:1].lower() + line[1:]


def configuration() -> str:
    """List every option of the schema, section by section."""
    lines = ["# Configuration reference", "", _NOTE, "", _ABOUT_CONFIGURATION]
    for title, section in _sections(RunConfig, ""):
        lines += [f"## {title or 'Top level'}", "", _first_paragraph(section), ""]
        lines += ["| key | values | default | what it does |", "|---|---|---|---|"]
        for key, field in fields_of(section):
            if section_of(field.annotation) is None:
                name = f"{title}.{key}".lstrip(".")
                cells = [f"`{name}`", _values(field), _default(field), field.description or ""]
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _sections(section: type[BaseModel], title: str) -> Iterator[tuple[str, type[BaseModel]]]:
    yield title, section
    for key, field in fields_of(section):
        inner = section_of(field.annotation)
        if inner is not None:
            yield from _sections(inner, f"{title}.{key}".lstrip("."))


def _first_paragraph(section: type[BaseModel]) -> str:
    return " ".join((section.__doc__ or "").strip().split("\n\n")[0].split())


def _values(field: Any) -> str:
    """Format the valid values of an option, with bounds."""
    return _with_bounds(_type(field.annotation), field.metadata)


def _with_bounds(word: str, rules: Iterable[Any]) -> str:
    bounds = {}
    for rule in rules:
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"), ("pattern", "matches")):
            if getattr(rule, name, None) is not None:
                bounds[sign] = getattr(rule, name)
    return ", ".join([word, *(f"{sign} `{bound}`" for sign, bound in bounds.items())])


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        inner, field = get_args(annotation)
        return _with_bounds(_type(inner), field.metadata)
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if annotation is type(None):
        return "`null`"
    if get_origin(annotation) in {tuple, list}:
        inner = get_args(annotation)[0]
        return "list of sections as above" if section_of(inner) else f"list of {_type(inner)}"
    if get_origin(annotation) is dict:
        return "mapping"
    if parts := get_args(annotation):
        return " or ".join(_type(part) for part in parts)
    return {"str": "text", "int": "whole number", "float": "number", "bool": "`true` or `false`"}[annotation.__name__]


def _default(field: Any) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "`null`"
    written = str(value).lower() if isinstance(value, bool) else str(list(value) if isinstance(value, tuple) else value)
    written = written.replace("\n", "\\n")
    return f"`{written}`" if written else "empty"


def commands() -> str:
    """Print every verb's help as the program prints it."""
    lines = ["# Command reference", "", _NOTE, "", _ABOUT_COMMANDS]
    for words in verbs():
        shown = CliRunner().invoke(app, [*words, "--help"], prog_name="csr", env={"COLUMNS": "80"}).stdout
        text = "\n".join(line.rstrip() for line in shown.strip().splitlines())
        lines += [f"## {' '.join(['csr', *words])}", "", "```text", text, "```", ""]
    return "\n".join(lines)


def verbs() -> list[list[str]]:
    """List every verb as words after ``csr``, the program itself first."""
    return list(_walk(get_command(app), []))


def _walk(command: Any, words: list[str]) -> Iterator[list[str]]:
    yield words
    if isinstance(command, TyperGroup):
        for name, inner in command.commands.items():
            yield from _walk(inner, [*words, name])


def preset_table() -> str:
    """Tabulate every setting in which the paper, the released code and the default differ."""
    resolved = {name: _flat(load_config(None, [f"preset={name}"], base=_NEEDED).dump()) for name in _COMPARED}
    keys = list(dict.fromkeys(key for settings in resolved.values() for key in settings))
    lines = [f"| setting | {' | '.join(f'`{name}`' for name in _COMPARED)} |", "|---|" + "---|" * len(_COMPARED)]
    for key in keys:
        values = [resolved[name].get(key) for name in _COMPARED]
        if key != "preset" and any(value != values[0] for value in values):
            lines.append(
                f"| `{key}` | {' | '.join('-' if v is None else f'{v}' for v in values)} |".replace("\n", "\\n")
            )
    unknown = set(presets()) - {*_COMPARED, "sentences", "only_rt", "only_ri", "random_pairs", "sentinel", "external"}
    assert not unknown, f"docs/presets.md says nothing about {unknown}"
    return "\n".join(lines) + "\n"


def size_table() -> str:
    """Tabulate the settings of ``calibrated`` that depend on the size of the model."""
    classes = size_classes()
    names = [
        f"{one['name']}: " + (f"below {one['below'] / 1e9:g} B" if one["below"] else "larger, or unknown")
        for one in classes
    ]
    settings = [_flat(dict(one["settings"])) for one in classes]
    keys = list(dict.fromkeys(key for values in settings for key in values if key))
    preset = _flat(dict(presets()["calibrated"]))
    lines = [f"| setting | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    lines += [f"| `{key}` | {' | '.join(str(v.get(key, preset.get(key, '-'))) for v in settings)} |" for key in keys]
    return "\n".join(lines) + "\n"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: v for name, inner in value.items() for key, v in _flat(inner, f"{prefix}.{name}".lstrip(".")).items()}


if __name__ == "__main__":
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")
        print(HERE / name)
