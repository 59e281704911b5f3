"""What to do after a run: the commands that its state calls for."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from csr_vlm.report.benchmark_panel import Benchmarks
from csr_vlm.report.lambdas import Lambdas
from csr_vlm.store.run import Run


@dataclass(frozen=True)
class Step:
    why: str
    command: str


def next_steps(run: Run, finished: bool, lambdas: Lambdas | None, benchmarks: Benchmarks | None) -> list[Step]:
    """List what a reader may want next, the most urgent first."""
    root = shlex.quote(str(run.root))
    steps = []
    if not finished:
        steps.append(Step("Go on with the run where it stands", f"csr run {root}"))
    if run.stopped_at is not None:
        steps.append(Step("See the signs that stopped it", f"csr audit {root} --iteration {run.stopped_at}"))
    if finished and run.final:
        steps.append(Step("Write base and adapter as one model", f"csr merge {root}"))
        if not (run.root / "analysis.json").is_file():
            steps.append(Step("Look inside the model; adds a part to this report", f"csr analyze {root}"))
        if benchmarks is None and run.config.evaluation.world is None:
            steps.append(
                Step("Measure benchmarks; adds a part to this report", f"csr eval lmms {root} --tasks mme,gqa")
            )
    if lambdas is not None and not lambdas.trained:
        steps.append(Step("Train with other λ from the same ledger", f"csr sweep {root} method.lambda=0,0.5,0.9,1"))
    return steps
