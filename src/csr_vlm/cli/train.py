"""Implement ``csr train``."""

from __future__ import annotations

from csr_vlm.cli.arguments import NextIteration, RunArgument
from csr_vlm.cli.executors import executor_for
from csr_vlm.cli.single_stage import run_single_stage
from csr_vlm.core.progress import Reporter
from csr_vlm.store.run import Run


def train(target: RunArgument, iteration: NextIteration = None) -> None:
    """Run DPO on the pairs of one iteration.

    Example: csr train runs/q --iteration 1
    """
    with executor_for() as executor:
        from csr_vlm.pipeline import stages

        def train_on_pairs(run: Run, number: int, reporter: Reporter) -> None:
            stages.require_done(run, number, "pairs")
            stages.train(run, number, reporter, executor)

        run_single_stage("train", train_on_pairs, str(target), iteration, None, None)
