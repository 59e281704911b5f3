"""Implement ``csr compact``."""

from __future__ import annotations

from typing import Annotated

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import RunArgument
from csr_vlm.store.run import Run


def compact(
    target: RunArgument,
    megabytes: Annotated[int, typer.Option("--megabytes", min=1, help="Maximum size of a file in MB.")] = 256,
) -> None:
    """Merge small ledger files.

    The content of every finished ledger stays the same.

    Example: csr compact runs/d0
    """
    from csr_vlm.store import ledger

    run = Run.open(target)
    iterations = run.iterations_done("generate")
    before = sum(len(run.ledger_parts(number)) for number in iterations)
    with run.locked(), console.reporter().stage("merging ledger files", before) as progress:
        for number in iterations:
            ledger.pack(run, number, megabytes * 1_000_000, progress)
    after = sum(len(run.ledger_parts(number)) for number in iterations)
    console.log(f"merged {before} files into {after}")
    console.done(then=f"csr show {target}", run=str(target), before=before, after=after)
