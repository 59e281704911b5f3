"""``csr reproduce``: the paper's tables with the numbers of runs beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from csr_vlm.cli import console
from csr_vlm.store.run import Run


def reproduce(
    targets: Annotated[list[Path], typer.Argument(metavar="RUN", help="Directories of runs.")],
    out: Annotated[Path | None, typer.Option("--out", help="The page; RUN/reproduction.html by default.")] = None,
) -> None:
    """Write a page with the paper's published tables and what the runs measured beside them.

    Several runs fill the tables of lambda and of the ablation.
    Example: csr reproduce runs/lambda-0.9 runs/lambda-0.5 runs/only-rt
    """
    from csr_vlm.report.reproduction_page import write_reproduction

    runs = [Run.open(target) for target in targets]
    page = write_reproduction(runs, out or targets[0] / "reproduction.html")
    console.done(page, then=f"open {page} in a browser; it needs no network")
