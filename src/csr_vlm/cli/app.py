"""The verbs. Heavy libraries are imported inside the functions that need them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from csr_vlm.cli import console
from csr_vlm.cli.push import push
from csr_vlm.config import RunConfig, load_config
from csr_vlm.errors import CsrError
from csr_vlm.store.run import Run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Calibrated Self-Rewarding: make a vision-language model hallucinate less, without labels.",
    epilog="Start with: csr demo. Exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted.",
)
eval_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure the policies of a run.")
world_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="The embedded world: drawn scenes, tiny models."
)
app.add_typer(eval_app, name="eval")
app.add_typer(world_app, name="world")
app.command()(push)

Target = Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="Recipe (YAML), or the directory of a run.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as method.lambda=0.7.")]
Out = Annotated[Path | None, typer.Option("--out", help="Run directory; runs/NAME-OF-RECIPE by default.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Iteration = Annotated[int | None, typer.Option("--iteration", min=1, help="Which; the next one to do by default.")]


@app.command()
def run(
    target: Target, overrides: Overrides = None, out: Out = None, as_json: Json = False, quiet: Quiet = False
) -> None:
    """Run the whole loop, or go on with a run that was stopped.

    Example: csr run recipes/llava-1.5-7b.yaml data.limit=1000 --out runs/small
    """
    opened = _open_or_create(target, overrides, out)
    _align(opened, as_json, quiet)


@app.command()
def demo(
    seed: Annotated[int, typer.Option(min=0, help="Of the prompts, the search and the training.")] = 0,
    out: Annotated[Path, typer.Option("--out", help="Run directory.")] = Path("runs/demo"),
    prompts: Annotated[int, typer.Option(min=8, help="Pictures to learn from.")] = 256,
    scenes: Annotated[int, typer.Option(min=10, help="Test scenes.")] = 1000,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the method on the embedded world, where hallucination is measured against the truth.

    Example: csr demo --seed 0 --out runs/d0 --json
    """
    from csr_vlm.world.demo import demo_config

    _align(Run.create(out, demo_config(out, seed, prompts, scenes)), as_json, quiet)


@app.command()
def check(
    target: Target,
    overrides: Overrides = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Look at no model and no hub; prompts may be missing.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Validate a recipe and its data, print the resolved configuration and what a run would cost.

    A model whose weights are on disk also writes a few words and scores them again.
    Example: csr check recipes/llava-1.5-7b.yaml data.limit=100
    """
    import yaml

    console.quiet_libraries()
    from csr_vlm.estimate import estimate
    from csr_vlm.stages import check_model

    config = _config(target, overrides)
    tell = console.reporter(quiet)
    found = estimate(config, tell, offline=offline)
    if not offline and (difference := check_model(config, tell)) is not None:
        found["estimate"]["generated against scored, nats a token"] = float(f"{difference:.1e}")
    if as_json:
        console.print_json({"config": config.dump(), **found})
        return
    print(yaml.safe_dump(config.dump(), sort_keys=False, allow_unicode=True))
    console.print_table("", ["estimate", ""], [[name, str(value)] for name, value in found["estimate"].items()])
    for warning in found["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)


@app.command()
def generate(
    target: Target,
    overrides: Overrides = None,
    out: Out = None,
    iteration: Iteration = None,
    quiet: Quiet = False,
) -> None:
    """Do the search of one iteration: the ledger.

    Example: csr generate recipes/quickstart.yaml --out runs/q
    """
    _one_stage("generate", target, overrides, out, iteration, quiet)


@app.command()
def score(
    target: RunArgument,
    scorer: Annotated[str, typer.Option(help="Directory or hub id of another CLIP model.")],
    name: Annotated[str, typer.Option(help="Its name in the ledger.")],
    iteration: Iteration = None,
    quiet: Quiet = False,
) -> None:
    """Add another scorer's cosines to a ledger that exists.

    Then: csr pairs RUN scorer.name=NAME. Example: csr score runs/q --scorer ./siglip --name siglip
    """
    console.quiet_libraries()
    from csr_vlm import stages
    from csr_vlm.config import ScorerConfig

    opened = Run.open(target)
    number = iteration or max(opened.iterations_done("generate"), default=1)
    with opened.locked():
        stages.score(opened, number, ScorerConfig(path=scorer, name=name), console.reporter(quiet))
    print(
        f"iteration {number} is scored by {name}; use it with: csr pairs {target} scorer.name={name}", file=sys.stderr
    )


@app.command()
def pairs(
    target: RunArgument,
    overrides: Overrides = None,
    iteration: Iteration = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the pairs of changed settings here.")] = None,
    as_json: Json = False,
) -> None:
    """Derive the pairs of an iteration; with settings, show what they would make of the same ledger.

    Example: csr pairs runs/q method.lambda=0.9 --out /tmp/pairs.parquet
    """
    from csr_vlm import stages
    from csr_vlm.store import tables

    opened = Run.open(target)
    number = iteration or max(opened.iterations_done("generate"), default=1)
    if overrides:
        config = load_config(None, overrides, base=opened.config.dump())
        found, reasons = stages.derive_pairs(opened, number, config)
        if out is not None:
            tables.write_pairs(out, found)
        summary: dict[str, Any] = {
            "pairs": len(found),
            "prompts_without": dict(reasons),
            **stages.summarise_pairs(found),
        }
    else:
        with opened.locked():
            stages.make_pairs(opened, number, console.reporter(quiet=True))
        summary = opened.result(number, "pairs")
    if as_json:
        console.print_json(summary)
    else:
        console.print_table(f"iteration {number}", ["", ""], [[key, str(value)] for key, value in summary.items()])


@app.command()
def train(target: RunArgument, iteration: Iteration = None, quiet: Quiet = False) -> None:
    """Run DPO on the pairs of one iteration.

    Example: csr train runs/q --iteration 1
    """
    _one_stage("train", str(target), None, None, iteration, quiet)


@eval_app.command("world")
def eval_world(
    target: RunArgument,
    scenes: Annotated[int, typer.Option(min=10, help="Test scenes.")] = 1000,
    world_seed: Annotated[int, typer.Option(min=0, help="Which test scenes.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="0 decodes greedily.")] = 0.0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate base and every iteration of a run on test scenes of any seed.

    Example: csr eval world runs/d0 --scenes 1000 --world-seed 7 --json
    """
    console.quiet_libraries()
    from csr_vlm import stages

    opened = Run.open(target)
    tell = console.reporter(quiet)
    results: dict[int, Any] = {}
    for number in range(opened.last_trained + 1):
        results[number] = stages.evaluate_world(opened, number, scenes, world_seed, tell, temperature)
    if as_json:
        found = [{"iteration": n, "metrics": r["metrics"], "protocol": r["protocol"]} for n, r in results.items()]
        console.print_json({"run": str(target), "iterations": found})
    else:
        console.print_metrics(f"{scenes} test scenes", {n: r["metrics"] for n, r in results.items()})


@app.command()
def show(
    target: RunArgument,
    prompt: Annotated[str | None, typer.Argument(help="Prompt id; without it the run is summed up.")] = None,
    iteration: Iteration = None,
) -> None:
    """Show a run, or the search tree of one prompt with its rewards.

    Example: csr show runs/d0 harbour-prompts-0-000003 --iteration 1
    """
    from csr_vlm.cli import show as view

    opened = Run.open(target)
    if prompt is None:
        view.summary(opened)
    else:
        view.tree(opened, prompt, iteration)


@app.command()
def report(
    target: RunArgument,
    figure: Annotated[
        Path | None, typer.Option("--figure", help="Also draw one picture of the run: PNG, SVG, PDF.")
    ] = None,
) -> None:
    """Write RUN/report.html.

    Example: csr report runs/d0 --figure result.png
    """
    from csr_vlm.report.html import write_report

    opened = Run.open(target)
    print(write_report(opened))
    if figure is not None:
        from csr_vlm.report.figure import write_figure

        print(write_figure(opened, figure))


@app.command()
def merge(
    target: RunArgument, out: Annotated[Path | None, typer.Option("--out", help="RUN/model by default.")] = None
) -> None:
    """Write base model plus final adapter as one checkpoint.

    Example: csr merge runs/d0
    """
    console.quiet_libraries()
    opened = Run.open(target)
    adapter = opened.trained_adapter()
    from csr_vlm.training.dpo import merge as merge_adapter

    directory = out or target / "model"
    merge_adapter(opened.config.model, adapter, directory)
    print(directory)


@app.command()
def env(as_json: Json = False) -> None:
    """Print the versions that results depend on."""
    from csr_vlm.store.run import versions

    found = versions()
    if as_json:
        console.print_json(found)
    else:
        console.print_table("", ["package", "version"], [[name, version] for name, version in found.items()])


@world_app.command("build")
def world_build(
    out: Annotated[Path, typer.Option("--out", help="Directory for clip/, llava/ and build.json.")],
    seed: Annotated[int, typer.Option(min=0, help="Everything random follows from it.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only, to see that it works.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train the world's base models again, as the shipped ones were.

    Example: csr world build --out /tmp/world --seed 0
    """
    console.quiet_libraries()
    from dataclasses import replace

    from csr_vlm.world.build import BuildPlan, build_with_progress
    from csr_vlm.world.scenes import HARBOUR

    plan = BuildPlan(seed=seed)
    if quick:
        phases = tuple(replace(phase, steps=60) for phase in plan.policy_phases)
        plan = replace(plan, scorer_steps=60, policy_phases=phases)
    build_with_progress(HARBOUR, out, plan, console.reporter(quiet))
    print(out)


@world_app.command("check")
def world_check(
    directory: Annotated[
        Path | None, typer.Argument(help="Directory with clip/ and llava/; the shipped models by default.")
    ] = None,
    scenes: Annotated[int, typer.Option(min=10, help="Test scenes.")] = 1000,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the world's scorer and base model: what they see, and what they make up.

    Example: csr world build --out build/world && csr world check build/world
    """
    console.quiet_libraries()
    from csr_vlm.world.check import check_models
    from csr_vlm.world.demo import assets

    found = check_models(directory or assets(), scenes, console.reporter(quiet))
    if as_json:
        console.print_json(found)
        return
    console.print_table("", ["scorer", ""], [[name, f"{value:.4f}"] for name, value in found["scorer"].items()])
    print()
    console.print_metrics("", {0: found["policy"]})


@world_app.command("export")
def world_export(
    out: Annotated[Path, typer.Argument(help="Directory for the models, pictures and prompts.jsonl.")],
    prompts: Annotated[int, typer.Option(min=1, help="Pictures.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Which pictures.")] = 0,
) -> None:
    """Write the world's models and pictures as files, in the form users have theirs.

    Example: csr world export world && csr run recipes/quickstart.yaml
    """
    from csr_vlm.world.demo import export_world

    print(export_world(out, seed, prompts))


def main() -> None:
    """Run the command line; what a user can mend is printed without a traceback."""
    try:
        app()
    except CsrError as error:
        console.print_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def _config(target: str, overrides: list[str] | None) -> RunConfig:
    """Read the settings of a recipe, or of a run that exists."""
    path = Path(target)
    if path.is_dir():
        return load_config(None, overrides or (), base=Run.open(path).config.dump())
    return load_config(path, overrides or ())


def _open_or_create(target: str, overrides: list[str] | None, out: Path | None) -> Run:
    path = Path(target)
    if path.is_dir():
        if overrides:
            raise CsrError(
                f"{path} is a run; its settings are fixed", f"start another: csr run {path}/config.yaml --out DIR ..."
            )
        return Run.open(path)
    return Run.create(out or Path("runs") / path.stem, _config(target, overrides))


def _one_stage(
    stage: str, target: str, overrides: list[str] | None, out: Path | None, iteration: int | None, quiet: bool
) -> None:
    console.quiet_libraries()
    from csr_vlm import stages

    opened = _open_or_create(target, overrides, out)
    numbers = range(1, opened.config.iterations + 1)
    number = iteration or next((n for n in numbers if not opened.is_done(n, stage)), opened.config.iterations)
    tell = console.reporter(quiet)
    with opened.locked():
        if stage == "generate":
            stages.check_inputs(opened, tell)
        stages.require_before(opened, number, stage)
        getattr(stages, stage)(opened, number, tell)
    print(f"iteration {number} of {opened.root}: {stage} is done", file=sys.stderr)


def _align(opened: Run, as_json: bool, quiet: bool) -> None:
    console.quiet_libraries()
    from csr_vlm.loop import align

    align(opened, console.reporter(quiet))
    numbers = opened.iterations_done("evaluate")
    results = {number: opened.result(number, "evaluate")["world"] for number in numbers}
    report_path = opened.root / "report.html"
    if as_json:
        console.print_json(
            {
                "run": str(opened.root),
                "adapter": str(opened.root / "adapter"),
                "report": str(report_path),
                "iterations": [{"iteration": number, "metrics": metrics} for number, metrics in results.items()],
            }
        )
        return
    if results:
        console.print_metrics("Hallucination before and after, with 95 % intervals", results)
    print(f"\nadapter  {opened.root / 'adapter'}\nreport   {report_path}")
    print(f"next: open the report, or csr show {opened.root}", file=sys.stderr)
