"""Writes the pages that follow from the program: ``python -m docs.reference``; a test checks that they are current."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from csr_vlm.cli.app import app
from csr_vlm.config.load import fields_of, load_config, section_of
from csr_vlm.config.schema import RunConfig, presets

HERE = Path(__file__).parent
_ABOUT_CONFIGURATION = """\
A recipe is a YAML file of these options; `key=value` on the command line goes on top, as in
`csr run recipes/llava-1.5-7b.yaml method.lambda=0.7 data.limit=1000`. Values are YAML. What the recipe leaves out
comes from its `preset`, and what that leaves out from the defaults here. Unknown keys are refused, with the nearest
one. `csr check RECIPE` prints the whole configuration resolved.
"""
_ABOUT_COMMANDS = """\
Results go to stdout; progress, warnings and what to do next go to stderr. `--quiet`, `--verbose`, `--json`,
`--no-color` (or the environment variable `NO_COLOR`) and `--debug` may stand before or after the verb. With `--json`
stdout holds one JSON document and nothing else; verbs that write files name them under `written`. An error is told in
three lines: `error:` what, `why:`, and `hint:` what to do.

Tab completion: `csr --install-completion` once, for bash, zsh, fish and PowerShell; it knows verbs, options, recipes,
runs and the keys of the configuration.
"""
_NOTE = "<!-- Written by `python -m docs.reference`; do not edit. -->"
_MARKS = re.compile(r"(<!-- table: begin -->\n).*(<!-- table: end -->)", re.DOTALL)
_COMPARED = ("paper", "official", "calibrated")
_NEEDED = {"model": {"path": "M"}, "scorer": {"path": "S"}, "data": {"prompts": "P", "pairs": "Q"}}


def pages() -> dict[str, str]:
    """Map the name of every page that is written here to its text."""
    around = (HERE / "presets.md").read_text(encoding="utf-8")
    table = preset_table()
    return {
        "configuration.md": configuration(),
        "commands.md": commands(),
        "presets.md": _MARKS.sub(lambda found: found[1] + table + found[2], around),
    }


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
    """Word what an option may be, bounds included."""
    bounds = {}
    for rule in field.metadata:
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"), ("pattern", "matches")):
            if getattr(rule, name, None) is not None:
                bounds[sign] = getattr(rule, name)
    word = _type(field.annotation)
    return ", ".join([word, *(f"{sign} `{bound}`" for sign, bound in bounds.items())])


def _type(annotation: Any) -> str:
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
            lines.append(f"| `{key}` | {' | '.join('-' if v is None else f'{v}' for v in values)} |")
    unknown = set(presets()) - {*_COMPARED, "only_rt", "only_ri", "random_pairs", "external"}
    assert not unknown, f"docs/presets.md says nothing about {unknown}"
    return "\n".join(lines) + "\n"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: v for name, inner in value.items() for key, v in _flat(inner, f"{prefix}.{name}".lstrip(".")).items()}


if __name__ == "__main__":
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")
        print(HERE / name)
