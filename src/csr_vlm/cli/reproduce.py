"""Implement ``csr reproduce``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from csr_vlm.cli import console
from csr_vlm.store.run import Run


def reproduce(
    targets: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories.")],
    out: Annotated[Path | None, typer.Option("--out", help="Page to write (default: RUN/reproduction.html).")] = None,
) -> None:
    """Compare runs with the paper's published tables.

    Writes an HTML page. Several runs fill the lambda and ablation tables.

    Example: csr reproduce runs/lambda-0.9 runs/lambda-0.5 runs/only-rt
    """
    from csr_vlm.report.reproduction_page import write_reproduction

    runs = [Run.open(target) for target in targets]
    page = write_reproduction(runs, out or targets[0] / "reproduction.html")
    console.done(page, then=f"open {page} in a browser; it works offline")
