"""Implement ``csr run``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import Out, Overrides, Target, open_or_create, read_settings
from csr_vlm.cli.check import print_estimate, runs_beside
from csr_vlm.cli.executors import Gpus, RayActors, executor_for, num_processes
from csr_vlm.cli.signals import stoppable
from csr_vlm.core.errors import CsrError
from csr_vlm.core.formatting import duration
from csr_vlm.scale.executor import LOCAL, Executor
from csr_vlm.scale.launch import launch
from csr_vlm.store.run import Run


def run(
    target: Target,
    overrides: Overrides = None,
    out: Out = None,
    gpus: Gpus = None,
    ray: RayActors = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the steps, what is left and what it costs; write nothing.")
    ] = False,
) -> None:
    """Run the whole method, or resume a run.

    On several GPUs of one machine: csr run RECIPE --gpus 8; on several machines: torchrun (docs/scaling.md).
    Example: csr run recipes/llava-1.5-7b.yaml data.limit=1000 --out runs/small
    """
    if dry_run:
        planned = open_or_create(target, overrides, out, dry_run=True)
        _print_schedule(planned, " ".join([target, *(overrides or ()), *(["--out", str(out)] if out else [])]))
        return
    if gpus is not None and ray is not None:
        raise CsrError("--gpus cannot be combined with --ray", "use one of them")
    number = num_processes(gpus, read_settings(target, overrides).model.device)
    if number > 1:
        open_or_create(target, overrides, out, dry_run=True)  # what is wrong with the arguments is said once
        raise typer.Exit(launch(number, ["-m", "csr_vlm.cli", *sys.argv[1:]]))
    with executor_for(ray) as executor:
        align_and_print(open_or_create(target, overrides, out), executor)


def _print_schedule(planned: Run, arguments: str) -> None:
    """Print the steps of a run and the cost of the whole run."""
    from csr_vlm.pipeline.schedule import StepState, schedule, seconds_left

    console.quiet_libraries()
    from csr_vlm.pipeline.estimate import estimate

    config = planned.config
    costs = estimate(
        config, console.reporter(), offline=not Path(config.model.path).is_dir(), runs=runs_beside(planned.root)
    )
    steps = schedule(planned)
    seconds = seconds_left(steps)
    if console.mode.json:
        dumped = [step.dump() for step in steps]
        console.print_json({"run": str(planned.root), "steps": dumped, "seconds_left": seconds, **costs.dump()})
        return
    rows = [
        [
            f"iteration {step.iteration}" if step.iteration else "base model",
            step.stage,
            f"{step.state.value} {step.note}".strip(),
            "-" if step.seconds is None else duration(step.seconds),
        ]
        for step in steps
    ]
    console.print_table(f"{planned.root}: dry run, nothing is written", ["", "step", "state", "time"], rows)
    print()
    print_estimate(costs)
    num_left = sum(step.state is not StepState.DONE for step in steps)
    time_left = f", about {duration(seconds)}" if seconds and num_left else ""
    print(f"\n{num_left} of {len(steps)} steps left{time_left}; results go to {planned.root}")
    console.log(f"next: csr run {arguments}" if num_left else f"next: csr show {planned.root}")


def align_and_print(opened: Run, executor: Executor = LOCAL) -> None:
    """Run the whole method in a run directory and print its metrics and results."""
    console.quiet_libraries()
    from csr_vlm.pipeline.loop import align

    with stoppable(console.reporter(), opened.root) as reporter:
        align(opened, reporter, executor)
    metrics = {number: opened.metrics(number) for number in opened.iterations_done("evaluate")}
    report_path = opened.root / "report.html"
    adapter = opened.root / "adapter" if opened.final else None
    if console.mode.json:
        console.print_json(
            {
                "run": str(opened.root),
                "adapter": str(adapter) if adapter else None,
                "stopped_at": opened.stopped_at,
                "report": str(report_path),
                "iterations": [{"iteration": number, "metrics": values} for number, values in metrics.items()],
            }
        )
        return
    if metrics:
        console.print_metrics("Hallucination before and after, with 95 % intervals", metrics)
    print(f"\nadapter  {adapter or 'none'}\nreport   {report_path}")
    console.log(f"next: open the report; csr show {opened.root}; csr compare {opened.root}")
