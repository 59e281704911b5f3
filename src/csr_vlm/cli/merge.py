"""Implement ``csr merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import RunArgument
from csr_vlm.core.errors import CsrError
from csr_vlm.store.run import Run


def merge(
    target: RunArgument,
    out: Annotated[Path | None, typer.Option("--out", help="New directory for the model (default: RUN/model).")] = None,
) -> None:
    """Merge the final adapter into the base model.

    Example: csr merge runs/d0
    """
    run = Run.open(target)
    run.trained_adapter()  # says what is missing before anything is loaded
    console.quiet_libraries()
    from csr_vlm.training.dpo import merge as merge_adapter

    directory = out or target / "model"
    if out is not None and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CsrError(f"{out} already exists", "give a new directory with --out; without --out, RUN/model is replaced")
    with run.locked_to_write(directory), console.reporter().stage("merging", 0):
        merge_adapter(run.config.model, run.trained_adapter(), directory)
    console.done(directory, then=f'AutoModelForImageTextToText.from_pretrained("{directory}") loads it')
