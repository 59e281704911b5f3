"""The verbs. Heavy libraries are imported inside the functions that need them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from csr_vlm.cli import console, world
from csr_vlm.cli import evaluate as evaluate_cli
from csr_vlm.cli.analyse import analyse
from csr_vlm.cli.compare import MeasureByDefault, compare, measure
from csr_vlm.cli.convert import convert
from csr_vlm.cli.export import export
from csr_vlm.cli.health import audit, sweep
from csr_vlm.cli.lmms import eval_lmms
from csr_vlm.cli.push import push
from csr_vlm.cli.reproduce import reproduce
from csr_vlm.cli.stopping import stoppable
from csr_vlm.config import RunConfig, load_config
from csr_vlm.errors import CsrError
from csr_vlm.store.run import Run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Calibrated Self-Rewarding: make a vision-language model hallucinate less, without labels.",
    epilog="Start with: csr demo. Exit codes: 0 done, 1 error, 2 wrong usage, 3 a --fail-if holds or an audit says "
    "stop, 130 interrupted, 143 terminated.",
)
eval_app = typer.Typer(
    cls=MeasureByDefault,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure the policies of a run: csr eval RUN.",
)
app.add_typer(eval_app, name="eval")
eval_app.command("run")(measure)
eval_app.command("lmms")(eval_lmms)
for _name, _command in evaluate_cli.EVAL_COMMANDS.items():
    eval_app.command(_name)(_command)
app.add_typer(world.app, name="world")

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
    scorer: Annotated[str, typer.Option(help="Another scorer, as in scorer.path.")],
    name: Annotated[str, typer.Option(help="Its name in the ledger.")],
    iteration: Iteration = None,
    trust_import: Annotated[bool, typer.Option(help="Run the class that python:MODULE:CLASS names.")] = False,
    quiet: Quiet = False,
) -> None:
    """Add another scorer's cosines to a ledger that exists.

    Then: csr pairs RUN scorer.use=NAME. Example: csr score runs/q --scorer ./siglip --name siglip
    """
    console.quiet_libraries()
    from csr_vlm import stages
    from csr_vlm.config import scorer_config

    config = scorer_config(path=scorer, name=name, trust_import=trust_import)
    opened = Run.open(target)
    number = iteration or max(opened.iterations_done("generate"), default=1)
    with stoppable(console.reporter(quiet), opened.root) as tell, opened.locked():
        stages.score(opened, number, config, tell)
    print(f"iteration {number} is scored by {name}; use it with: csr pairs {target} scorer.use={name}", file=sys.stderr)


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
    from csr_vlm.evaluation.compare import policy_name

    opened = Run.open(target)
    tell = console.reporter(quiet)
    changed = [f"evaluation.world.num_scenes={scenes}", f"evaluation.world.seed={world_seed}"]
    config = load_config(None, changed, base=opened.config.dump())
    results: dict[int, Any] = {}
    for number in range(opened.last_trained + 1):
        adapter = opened.adapter_path(number)
        results[number] = stages.evaluate_world(config, adapter, policy_name(number), tell, temperature)
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


app.command("audit")(audit)
app.command("sweep")(sweep)
app.command("compare")(compare)
app.command("analyse")(analyse)
app.command("reproduce")(reproduce)
app.command("export")(export)
app.command()(convert)
app.command()(push)


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
    with stoppable(console.reporter(quiet), opened.root) as tell, opened.locked():
        if stage == "generate":
            stages.check_inputs(opened, tell)
        stages.require_before(opened, number, stage)
        getattr(stages, stage)(opened, number, tell)
    print(f"iteration {number} of {opened.root}: {stage} is done", file=sys.stderr)


def _align(opened: Run, as_json: bool, quiet: bool) -> None:
    console.quiet_libraries()
    from csr_vlm.loop import align

    with stoppable(console.reporter(quiet), opened.root) as tell:
        align(opened, tell)
    numbers = opened.iterations_done("evaluate")
    results = {number: opened.metrics(number) for number in numbers}
    report_path = opened.root / "report.html"
    adapter = opened.root / "adapter" if opened.final else None
    if as_json:
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
    print(f"next: open the report, or csr show {opened.root}", file=sys.stderr)
