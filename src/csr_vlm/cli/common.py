"""What all verbs have in common: the options of :mod:`console`'s modes, examples, and their order in the help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from csr_vlm.cli import console
from csr_vlm.core.errors import CsrError

SECTIONS = {
    "The whole method": ("demo", "check", "run", "watch"),
    "One stage of a run": ("generate", "score", "pairs", "train"),
    "Look and judge": ("show", "report", "audit", "eval", "compare", "analyse", "reproduce", "sweep"),
    "Take the result elsewhere": ("export", "merge", "push"),
    "Around it": ("convert", "compact", "world", "env"),
}
"""The order in which people need the verbs; one that is not here comes last."""
_EXAMPLE = "Example: "


def _sets(mode: str, value: bool = True) -> Callable[[bool], None]:
    """Make the callback of a flag that sets a mode; where the flag is absent nothing is changed."""

    def set_mode(given: bool) -> None:
        if given:
            setattr(console.mode, mode, value)

    return set_mode


def _modes(
    as_json: Annotated[
        bool,
        typer.Option("--json", callback=_sets("json"), expose_value=False, help="Print JSON for programs."),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet", "-q", callback=_sets("quiet"), expose_value=False, help="Only results and errors, no progress."
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", callback=_sets("verbose"), expose_value=False, help="Also what the libraries say."
        ),
    ] = False,
    no_color: Annotated[
        bool,
        typer.Option(
            "--no-color", callback=_sets("color", False), expose_value=False, help="Plain text; NO_COLOR does the same."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", callback=_sets("debug"), expose_value=False, help="Show an error's traceback.")
    ] = False,
) -> None:
    """Carry the options that every verb has."""


class Verbs(TyperGroup):
    """A group whose verbs get the common options, an example of their own, and a place in the help."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        options = get_command(_carrier).params
        self.params = [*options, *self.params]
        for verb in self.commands.values():
            if isinstance(verb, TyperGroup):
                continue
            taken = {name for parameter in verb.params for name in parameter.opts}
            verb.params = [*verb.params, *(option for option in options if not taken & set(option.opts))]
            if verb.help and not verb.epilog:
                text, marker, example = verb.help.partition(_EXAMPLE)
                verb.help = text.strip()
                verb.epilog = f"\b\n{_EXAMPLE.strip()}\n  {' '.join(example.split())}" if marker else None

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        if parent is None:
            console.mode.reset()
        return super().make_context(info_name, args, parent=parent, **extra)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for title, names in _sections(list(self.commands)) if ctx.parent is None else [("Verbs", list(self.commands))]:
            rows = [(name, self.commands[name]) for name in names]
            width = formatter.width - 6 - max(map(len, self.commands))
            with formatter.section(title):
                formatter.write_dl([(name, verb.get_short_help_str(width)) for name, verb in rows if not verb.hidden])


def _sections(verbs: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield (title, verbs) in the order of the help."""
    for title, names in SECTIONS.items():
        if there := [name for name in names if name in verbs]:
            yield title, there
    if others := [name for name in verbs if all(name not in names for names in SECTIONS.values())]:
        yield "More", others


class RunByDefault(Verbs):
    """A group that takes what is none of its commands for the arguments of ``run``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        first = next((place for place, part in enumerate(args) if not part.startswith("-")), None)
        if first is not None and args[first] not in self.commands:
            name = args[first]
            near = [] if "/" in name else get_close_matches(name, self.commands, n=1, cutoff=0.7)
            if near and not Path(name).exists():
                raise CsrError(f"{name} is neither a run nor a verb of {ctx.info_name}", f"did you mean {near[0]}?")
            args = ["run", *args]
        return super().parse_args(ctx, args)


_carrier = typer.Typer(add_completion=False)
_carrier.command()(_modes)
