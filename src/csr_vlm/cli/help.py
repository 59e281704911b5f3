"""Implement ``csr help``."""

from __future__ import annotations

from typing import Annotated

import typer
from typer.core import TyperGroup

from csr_vlm.core.errors import CsrError


def show_help(
    context: typer.Context,
    verb: Annotated[
        list[str] | None, typer.Argument(metavar="VERB", help="Verb, such as run or eval chair (default: list all).")
    ] = None,
) -> None:
    """Show the help of csr or of a verb.

    Example: csr help eval chair
    """
    shown = context.find_root()
    for word in verb or ():
        group = shown.command
        if not isinstance(group, TyperGroup):
            raise CsrError(
                f"{shown.command_path} has no verb {word!r}", f"{shown.command_path} --help lists its arguments"
            )
        name, command, _ = group.resolve_command(shown, [word])
        assert command is not None
        shown = command.context_class(command, info_name=name, parent=shown)
    print(shown.get_help())
