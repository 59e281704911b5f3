"""Implement ``csr generate``."""

from __future__ import annotations

from csr_vlm.cli.arguments import NextIteration, Out, Overrides, Target
from csr_vlm.cli.executors import RayActors, executor_for
from csr_vlm.cli.single_stage import run_single_stage
from csr_vlm.core.progress import Reporter
from csr_vlm.store.run import Run


def generate(
    target: Target,
    overrides: Overrides = None,
    out: Out = None,
    iteration: NextIteration = None,
    ray: RayActors = None,
) -> None:
    """Search the responses of one iteration.

    Writes the ledger: every candidate sentence with its scores.

    Example: csr generate quickstart --out runs/q
    """
    with executor_for(ray) as executor:
        from csr_vlm.pipeline import stages

        def check_and_generate(run: Run, number: int, reporter: Reporter) -> None:
            stages.check_inputs(run, reporter)
            stages.require_done(run, number - 1, "train")
            stages.generate(run, number, reporter, executor)

        run_single_stage("generate", check_and_generate, target, iteration, overrides, out)
