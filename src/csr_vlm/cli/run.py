"""``csr run``, ``demo`` and ``check``: the whole method, and what it would cost."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import Out, Overrides, Target, open_or_create, settings
from csr_vlm.cli.executors import RayActors, crew_of
from csr_vlm.cli.signals import stoppable
from csr_vlm.scale.executor import ALONE, Crew
from csr_vlm.store.run import Run


def run(
    target: Target,
    overrides: Overrides = None,
    out: Out = None,
    ray: RayActors = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what is done, what remains and what it costs; write nothing.")
    ] = False,
) -> None:
    """Run the whole loop, or go on with a run that was stopped.

    On several GPUs: torchrun --nproc-per-node 8 -m csr_vlm.cli run RECIPE (docs/scaling.md).
    Example: csr run recipes/llava-1.5-7b.yaml data.limit=1000 --out runs/small
    """
    if dry_run:
        planned = open_or_create(target, overrides, out, plan_only=True)
        _show_plan(planned, " ".join([target, *(overrides or ()), *(["--out", str(out)] if out else [])]))
        return
    with crew_of(ray) as crew:
        if crew is not None:
            _align(open_or_create(target, overrides, out), crew)


def demo(
    seed: Annotated[int, typer.Option(min=0, help="Of the prompts, the search and the training.")] = 0,
    out: Annotated[Path, typer.Option("--out", help="Run directory.")] = Path("runs/demo"),
    prompts: Annotated[int, typer.Option(min=8, help="Pictures to learn from.")] = 256,
    scenes: Annotated[int, typer.Option(min=10, help="Test scenes.")] = 1000,
    world: Annotated[str, typer.Option("--world", help="Which world: harbour or prose.")] = "harbour",
) -> None:
    """Run the method on the embedded world, where hallucination is measured against the truth.

    Example: csr demo --seed 0 --out runs/d0 --json
    """
    from csr_vlm.world.demo import demo_config
    from csr_vlm.world.scenes import world_named

    _align(Run.create(out, demo_config(out, seed, prompts, scenes, world_named(world))))


def check(
    target: Target,
    overrides: Overrides = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Look at no model and no hub; prompts may be missing.")
    ] = False,
) -> None:
    """Validate a recipe and its data, print the resolved configuration and what a run would cost.

    A model whose weights are on disk also writes a few sentences, and the scorer shows whether it tells pictures apart.
    Example: csr check recipes/llava-1.5-7b.yaml data.limit=100
    """
    import yaml

    config = settings(target, overrides)
    console.quiet_libraries()
    from csr_vlm.pipeline.estimate import estimate
    from csr_vlm.pipeline.preflight import try_out

    tell = console.reporter()
    found = estimate(config, tell, offline=offline)
    if not offline:
        tried = try_out(config, tell)
        found["estimate"] |= tried["estimate"]
        found["warnings"] += tried["warnings"]
    if console.mode.json:
        console.print_json({"config": config.dump(), **found})
        return
    print(yaml.safe_dump(config.dump(), sort_keys=False, allow_unicode=True))
    _print_estimate(found)
    console.say("next: csr run with the same words; --dry-run first shows the steps")


def _print_estimate(found: dict[str, Any]) -> None:
    console.print_table("", ["estimate", ""], [[name, str(value)] for name, value in found["estimate"].items()])
    for warning in found["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)


def _show_plan(opened: Run, words: str) -> None:
    """Print the steps of a run and what the whole would cost."""
    from csr_vlm.pipeline import schedule

    console.quiet_libraries()
    from csr_vlm.pipeline.estimate import estimate

    config = opened.config
    found = estimate(config, console.reporter(), offline=not Path(config.model.path).is_dir())
    steps = schedule.steps(opened)
    left = schedule.seconds_left(steps)
    if console.mode.json:
        console.print_json(
            {"run": str(opened.root), "steps": [step.dump() for step in steps], "seconds_left": left, **found}
        )
        return
    rows = [
        [
            f"iteration {step.iteration}" if step.iteration else "base model",
            step.stage,
            f"{step.state.value} {step.note}".strip(),
            "-" if step.seconds is None else console.duration(step.seconds),
        ]
        for step in steps
    ]
    console.print_table(f"{opened.root}: nothing is written", ["", "step", "state", "time"], rows)
    print()
    _print_estimate(found)
    remaining = sum(step.state is not schedule.State.DONE for step in steps)
    known = f", about {console.duration(left)}" if left and remaining else ""
    print(f"\n{remaining} of {len(steps)} steps remain{known}; results go to {opened.root}")
    console.say(f"next: csr run {words}" if remaining else f"next: csr show {opened.root}")


def _align(opened: Run, crew: Crew = ALONE) -> None:
    console.quiet_libraries()
    from csr_vlm.pipeline.loop import align

    with stoppable(console.reporter(), opened.root) as tell:
        align(opened, tell, crew)
    results = {number: opened.metrics(number) for number in opened.iterations_done("evaluate")}
    report_path = opened.root / "report.html"
    adapter = opened.root / "adapter" if opened.final else None
    if console.mode.json:
        console.print_json(
            {
                "run": str(opened.root),
                "adapter": str(adapter) if adapter else None,
                "stopped_at": opened.stopped_at,
                "report": str(report_path),
                "iterations": [{"iteration": number, "metrics": metrics} for number, metrics in results.items()],
            }
        )
        return
    if results:
        console.print_metrics("Hallucination before and after, with 95 % intervals", results)
    print(f"\nadapter  {adapter or 'none'}\nreport   {report_path}")
    console.say(f"next: open the report; csr show {opened.root}; csr compare {opened.root}")
