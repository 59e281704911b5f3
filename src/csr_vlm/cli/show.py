"""Implement ``csr show``."""

from __future__ import annotations

from typing import Annotated

import typer

from csr_vlm.cli.arguments import GeneratedIteration, RunArgument
from csr_vlm.store.run import Run


def show(
    target: RunArgument,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Prompt id (default: summary of the run).")
    ] = None,
    iteration: GeneratedIteration = None,
) -> None:
    """Show a run, or the search tree of a prompt.

    Example: csr show runs/d0 harbour-prompts-0-000003 --iteration 1
    """
    from csr_vlm.cli.run_view import print_summary, print_tree

    run = Run.open(target)
    if prompt is None:
        print_summary(run)
    else:
        print_tree(run, prompt, iteration)
