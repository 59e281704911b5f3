"""Run a single stage of a run, for the verbs named after stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from csr_vlm.cli import console
from csr_vlm.cli.arguments import open_or_create
from csr_vlm.cli.signals import stoppable
from csr_vlm.core.progress import Reporter
from csr_vlm.store.progress_file import record_progress
from csr_vlm.store.run import Run

RunStage = Callable[[Run, int, Reporter], None]
"""Function that does a stage of one iteration."""


def run_single_stage(
    stage: str, run_stage: RunStage, target: str, iteration: int | None, overrides: list[str] | None, out: Path | None
) -> None:
    """Do one stage of an iteration (default: the next unfinished one)."""
    run = open_or_create(target, overrides, out)
    console.quiet_libraries()
    iterations = range(1, run.config.iterations + 1)
    number = iteration or next((n for n in iterations if not run.is_done(n, stage)), run.config.iterations)
    with (
        stoppable(console.reporter(), run.root) as shown,
        run.locked(),
        record_progress(run.root, shown) as reporter,
    ):
        run_stage(run, number, reporter)
    console.log(f"iteration {number} of {run.root}: {stage} is done")
    next_command = {"generate": f"csr pairs {run.root}", "train": f"csr eval {run.root}"}[stage]
    console.done(run.iteration(number), then=next_command, run=str(run.root), iteration=number, stage=stage)
