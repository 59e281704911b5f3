"""Give all verbs the output options and an example, and group them in the help."""

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
    "Run": ("init", "recipes", "demo", "check", "run", "watch"),
    "Inspect": ("show", "chat", "try", "report", "audit", "analyze"),
    "Evaluate": ("eval", "compare", "reproduce", "validate-scorer"),
    "Share": ("export", "merge", "push"),
    "Advanced": (
        *("generate", "score", "pairs", "train", "sweep", "ablate"),
        *("convert", "compact", "world", "env", "version", "help"),
    ),
}
"""Verbs by what one wants to do; a verb that is not listed here comes last."""
_EXAMPLE = "Example: "


def _sets(mode: str, value: bool = True) -> Callable[[bool], None]:
    """Return the callback of a flag that sets an output option if the flag is given."""

    def set_mode(flag: bool) -> None:
        if flag:
            setattr(console.mode, mode, value)

    return set_mode


def _modes(
    as_json: Annotated[
        bool,
        typer.Option("--json", callback=_sets("json"), expose_value=False, help="Print JSON."),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            callback=_sets("quiet"),
            expose_value=False,
            help="Print only results and errors, no progress.",
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", callback=_sets("verbose"), expose_value=False, help="Show messages of the libraries too."
        ),
    ] = False,
    no_color: Annotated[
        bool,
        typer.Option(
            "--no-color",
            callback=_sets("color", False),
            expose_value=False,
            help="Print without color, like NO_COLOR=1.",
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", callback=_sets("debug"), expose_value=False, help="Print the traceback of an error."),
    ] = False,
) -> None:
    """Hold the options that every verb has."""


class Verbs(TyperGroup):
    """Give the verbs of a group the common options, an example and a section in the help."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        options = get_command(_options_app).params
        self.params = [*options, *self.params]
        for verb in self.commands.values():
            if isinstance(verb, TyperGroup):
                continue
            used = {name for parameter in verb.params for name in parameter.opts}
            verb.params = [*verb.params, *(option for option in options if not used & set(option.opts))]
            if verb.help and not verb.epilog:
                text, marker, example = verb.help.partition(_EXAMPLE)
                verb.help = text.strip()
                verb.epilog = f"\b\n{_EXAMPLE.strip()}\n  {' '.join(example.split())}" if marker else None

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        """Reset the output options before the command line is parsed."""
        if parent is None:
            console.mode.reset()
        return super().make_context(info_name, args, parent=parent, **extra)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the verbs in sections, with one line each."""
        for title, names in _sections(list(self.commands)) if ctx.parent is None else [("Verbs", list(self.commands))]:
            rows = [(name, self.commands[name]) for name in names]
            width = formatter.width - 6 - max(map(len, self.commands))
            with formatter.section(title):
                formatter.write_dl([(name, verb.get_short_help_str(width)) for name, verb in rows if not verb.hidden])


def _sections(verbs: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the title and the verbs of each section."""
    for title, names in SECTIONS.items():
        if listed := [name for name in names if name in verbs]:
            yield title, listed
    if unlisted := [name for name in verbs if all(name not in names for names in SECTIONS.values())]:
        yield "More", unlisted


class RunByDefault(Verbs):
    """Treat arguments that do not begin with a verb of the group as arguments of ``run``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert ``run`` if the first argument is not a verb; suggest the nearest verb if it looks like a typo."""
        first = next((index for index, word in enumerate(args) if not word.startswith("-")), None)
        if first is not None and args[first] not in self.commands:
            name = args[first]
            near = [] if "/" in name else get_close_matches(name, self.commands, n=1, cutoff=0.7)
            if near and not Path(name).exists():
                raise CsrError(f"{name} is neither a run nor a verb of {ctx.info_name}", f"did you mean {near[0]}?")
            args = ["run", *args]
        return super().parse_args(ctx, args)


_options_app = typer.Typer(add_completion=False)
_options_app.command()(_modes)
