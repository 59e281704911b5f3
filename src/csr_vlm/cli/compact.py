"""``csr compact``: a run's ledgers in fewer files."""

from __future__ import annotations

from typing import Annotated

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import RunArgument
from csr_vlm.store.run import Run


def compact(
    target: RunArgument,
    megabytes: Annotated[int, typer.Option("--megabytes", min=1, help="Most of one file.")] = 256,
) -> None:
    """Pack the small files of every finished ledger into few.

    Whatever reads the ledger reads the same rows.

    Example: csr compact runs/d0
    """
    from csr_vlm.store import ledger

    opened = Run.open(target)
    numbers = opened.iterations_done("generate")
    before = sum(len(opened.ledger_parts(number)) for number in numbers)
    with opened.locked(), console.reporter().stage("packing the ledgers", before) as progress:
        for number in numbers:
            ledger.pack(opened, number, megabytes * 1_000_000, progress)
    after = sum(len(opened.ledger_parts(number)) for number in numbers)
    console.log(f"{before} files became {after}")
    console.done(then=f"csr show {target}", run=str(target), before=before, after=after)
