"""Suggest what to run next, given the state of a run."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from csr_vlm.report.benchmark_panel import BenchmarkPanel
from csr_vlm.report.lambda_panel import LambdaPanel
from csr_vlm.store.run import Run


@dataclass(frozen=True)
class NextStep:
    """Represent a suggested command and its purpose."""

    purpose: str
    command: str


def next_steps(
    run: Run, finished: bool, lambdas: LambdaPanel | None, benchmarks: BenchmarkPanel | None
) -> list[NextStep]:
    """List the suggested commands, the most urgent first."""
    root = shlex.quote(str(run.root))
    steps = []
    if not finished:
        steps.append(NextStep("Resume the run", f"csr run {root}"))
    if run.stopped_at is not None:
        steps.append(NextStep("Inspect the checks that stopped it", f"csr audit {root} --iteration {run.stopped_at}"))
    if finished and run.final:
        steps.append(NextStep("Merge the adapter into the base model", f"csr merge {root}"))
        if not (run.root / "analysis.json").is_file():
            steps.append(NextStep("Analyze attention and log-probabilities", f"csr analyze {root}"))
        if benchmarks is None and run.config.evaluation.world is None:
            steps.append(NextStep("Evaluate on public benchmarks", f"csr eval lmms {root} --tasks mme,gqa"))
    if lambdas is not None and not lambdas.trained_figures:
        command = f"csr sweep {root} method.lambda=0,0.5,0.9,1"
        steps.append(NextStep("Train with other values of λ on the same ledger", command))
    return steps
