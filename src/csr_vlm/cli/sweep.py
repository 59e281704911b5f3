"""Implement ``csr sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import RunArgument
from csr_vlm.store.run import Run


def sweep(
    target: RunArgument,
    axes: Annotated[
        list[str], typer.Argument(metavar="KEY=V,V", help="Values of a setting, such as method.lambda=0,0.5,1.")
    ],
    iteration: Annotated[int, typer.Option("--iteration", min=1, help="Iteration of the ledger.")] = 1,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the results (default: RUN/sweeps).")] = None,
) -> None:
    """Compare settings by training on the same ledger.

    Pairs are derived and a policy is trained for every value; several axes make a grid.

    Example: csr sweep runs/d0 method.lambda=0,0.1,0.5,0.9,1
    """
    run = Run.open(target)
    console.quiet_libraries()
    from csr_vlm.pipeline.sweep import sweep as run_sweep

    folder = out or target / "sweeps"
    with run.locked_to_write(folder):
        rows = run_sweep(run, axes, iteration, folder, console.reporter())
    if console.mode.json:
        console.print_json({"run": str(target), "iteration": iteration, "points": rows})
        return
    for evaluation in rows[0]["metrics"]:
        names = list(rows[0]["metrics"][evaluation])
        table = [
            [" ".join(row["overrides"]), *(_value(row["metrics"][evaluation][name]) for name in names)] for row in rows
        ]
        title = f"{evaluation}, after one training on the ledger of iteration {iteration}"
        console.print_table(title, ["", *names], table)
    console.log(f"results are in {folder}; next: csr run with the best value and another seed")


def _value(metric: dict[str, Any]) -> str:
    return "-" if metric["value"] is None else f"{metric['value']:.3f}"
