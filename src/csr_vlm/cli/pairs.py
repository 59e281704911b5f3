"""Implement ``csr pairs``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import GeneratedIteration, Overrides, RunArgument, last_generated
from csr_vlm.cli.executors import RayActors, executor_for
from csr_vlm.cli.signals import stoppable
from csr_vlm.config.load import load_config
from csr_vlm.scale.executor import Executor
from csr_vlm.store.run import Run


def pairs(
    target: RunArgument,
    overrides: Overrides = None,
    iteration: GeneratedIteration = None,
    out: Annotated[Path | None, typer.Option("--out", help="File for the pairs that changed settings derive.")] = None,
    ray: RayActors = None,
) -> None:
    """Derive the preference pairs of one iteration.

    With settings, shows which pairs they would derive from the same ledger, and leaves the run unchanged.

    Example: csr pairs runs/q method.lambda=0.9 --out /tmp/pairs.parquet
    """
    with executor_for(ray) as executor:
        run = Run.open(target)
        number = iteration or last_generated(run)
        summary = _try_settings(run, number, overrides, out) if overrides else _make_pairs(run, number, executor)
    if console.mode.json:
        console.print_json(summary)
    else:
        console.print_table(f"iteration {number}", ["", ""], [[key, str(value)] for key, value in summary.items()])
    arguments = " ".join([str(target), *(overrides or ())])
    console.log(f"next: csr audit {arguments}; csr {'sweep' if overrides else 'train'} {arguments}")


def _make_pairs(run: Run, number: int, executor: Executor) -> dict[str, Any]:
    from csr_vlm.pipeline import stages

    with stoppable(console.reporter(), run.root) as reporter, run.locked():
        stages.make_pairs(run, number, reporter, executor)
    return run.result(number, "pairs")


def _try_settings(run: Run, number: int, overrides: list[str], out: Path | None) -> dict[str, Any]:
    from csr_vlm.pipeline import stages
    from csr_vlm.store import tables

    config = load_config(None, overrides, base=run.config.dump())
    derived, reasons = stages.derive_pairs(run, number, config, console.reporter())
    if out is not None:
        tables.write_pairs(out, derived)
    return {"pairs": len(derived), "prompts_without": dict(reasons), **stages.summarize_pairs(derived)}
