"""The verbs. Heavy libraries are imported inside the functions that need them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from csr_vlm.cli import console, error_messages, world
from csr_vlm.cli import evaluate as evaluate_cli
from csr_vlm.cli.analyze import analyze
from csr_vlm.cli.arguments import Iteration, Out, Overrides, RunArgument, Target, open_or_create
from csr_vlm.cli.audit import audit, sweep
from csr_vlm.cli.common import RunByDefault, Verbs
from csr_vlm.cli.compact import compact
from csr_vlm.cli.compare import compare, measure
from csr_vlm.cli.convert import convert
from csr_vlm.cli.executors import RayActors, executor_for
from csr_vlm.cli.export import export
from csr_vlm.cli.lmms import eval_lmms
from csr_vlm.cli.push import push
from csr_vlm.cli.reproduce import reproduce
from csr_vlm.cli.run import check, demo, run
from csr_vlm.cli.signals import Stopped, stoppable
from csr_vlm.cli.watch import watch
from csr_vlm.config.load import load_config, scorer_config
from csr_vlm.core.errors import CsrError
from csr_vlm.scale.executor import Executor
from csr_vlm.store.progress_file import record_progress
from csr_vlm.store.run import Run

INTERRUPTED = 130
"""What typer makes of Ctrl-C: 128 + SIGINT."""

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Calibrated Self-Rewarding: make a vision-language model hallucinate less, without labels.",
    epilog="""Start with: csr demo. Every verb has an example: csr VERB --help.

\b
Exit codes:
  0    done
  1    an error; what, why and a hint stand on stderr
  2    wrong usage: no such verb or option
  3    a --fail-if holds, or an audit says stop
  130  interrupted, 143 terminated; the same command goes on""",
)
eval_app = typer.Typer(
    cls=RunByDefault,
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
for _verb in (run, demo, check):
    app.command()(_verb)


@app.command()
def generate(
    target: Target,
    overrides: Overrides = None,
    out: Out = None,
    iteration: Iteration = None,
    ray: RayActors = None,
) -> None:
    """Do the search of one iteration: the ledger.

    Example: csr generate recipes/quickstart.yaml --out runs/q
    """
    with executor_for(ray) as executor:
        _one_stage("generate", target, overrides, out, iteration, executor)


@app.command()
def score(
    target: RunArgument,
    scorer: Annotated[str, typer.Option(help="Another scorer, as in scorer.path.")],
    name: Annotated[str, typer.Option(help="Its name in the ledger.")],
    iteration: Iteration = None,
    trust_import: Annotated[bool, typer.Option(help="Run the class that python:MODULE:CLASS names.")] = False,
    ray: RayActors = None,
) -> None:
    """Add another scorer's cosines to a ledger that exists.

    Example: csr score runs/q --scorer ./siglip --name siglip
    """
    config = scorer_config(path=scorer, name=name, trust_import=trust_import)
    with executor_for(ray) as executor:
        from csr_vlm.pipeline import stages

        opened = Run.open(target)
        number = iteration or max(opened.iterations_done("generate"), default=1)
        with stoppable(console.reporter(), opened.root) as reporter, opened.locked():
            stages.score(opened, number, config, reporter, executor)
    console.log(f"iteration {number} is scored by {name}")
    console.done(then=f"csr pairs {target} scorer.use={name}", run=str(target), iteration=number, scorer=name)


@app.command()
def pairs(
    target: RunArgument,
    overrides: Overrides = None,
    iteration: Iteration = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the pairs of changed settings here.")] = None,
    ray: RayActors = None,
) -> None:
    """Derive the pairs of an iteration; with settings, show what they would make of the same ledger.

    Example: csr pairs runs/q method.lambda=0.9 --out /tmp/pairs.parquet
    """
    with executor_for(ray) as executor:
        opened = Run.open(target)
        number = iteration or max(opened.iterations_done("generate"), default=1)
        summary = _other_pairs(opened, number, overrides, out) if overrides else _own_pairs(opened, number, executor)
    if console.mode.json:
        console.print_json(summary)
    else:
        console.print_table(f"iteration {number}", ["", ""], [[key, str(value)] for key, value in summary.items()])
    changed = " ".join(overrides or ())
    console.log(
        f"next: csr audit {target} {changed}; then csr "
        + (f"sweep {target} {changed}" if changed else f"train {target}")
    )


def _own_pairs(opened: Run, number: int, executor: Executor) -> dict[str, Any]:
    from csr_vlm.pipeline import stages

    with stoppable(console.reporter(), opened.root) as reporter, opened.locked():
        stages.make_pairs(opened, number, reporter, executor)
    return opened.result(number, "pairs")


def _other_pairs(opened: Run, number: int, overrides: list[str], out: Path | None) -> dict[str, Any]:
    from csr_vlm.pipeline import stages
    from csr_vlm.store import tables

    config = load_config(None, overrides, base=opened.config.dump())
    found, reasons = stages.derive_pairs(opened, number, config, console.reporter())
    if out is not None:
        tables.write_pairs(out, found)
    return {"pairs": len(found), "prompts_without": dict(reasons), **stages.summarise_pairs(found)}


@app.command()
def train(target: RunArgument, iteration: Iteration = None) -> None:
    """Run DPO on the pairs of one iteration.

    Example: csr train runs/q --iteration 1
    """
    with executor_for() as executor:
        _one_stage("train", str(target), None, None, iteration, executor)


@eval_app.command("world")
def eval_world(
    target: RunArgument,
    scenes: Annotated[int, typer.Option(min=10, help="Test scenes.")] = 1000,
    world_seed: Annotated[int, typer.Option(min=0, help="Which test scenes.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="0 decodes greedily.")] = 0.0,
) -> None:
    """Evaluate base and every iteration of a run on test scenes of any seed.

    Example: csr eval world runs/d0 --scenes 1000 --world-seed 7 --json
    """
    opened = Run.open(target)
    console.quiet_libraries()
    from csr_vlm.evaluation.compare import policy_name
    from csr_vlm.pipeline import stages

    reporter = console.reporter()
    changed = [f"evaluation.world.num_scenes={scenes}", f"evaluation.world.seed={world_seed}"]
    config = load_config(None, changed, base=opened.config.dump())
    results: dict[int, Any] = {}
    for number in range(opened.last_trained + 1):
        adapter = opened.adapter_path(number)
        results[number] = stages.evaluate_world(config, adapter, policy_name(number), reporter, temperature)
    if console.mode.json:
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
        Path | None, typer.Option("--figure", help="Also write one SVG with the metrics and examples.")
    ] = None,
) -> None:
    """Write RUN/report.html.

    Example: csr report runs/d0 --figure result.svg
    """
    from csr_vlm.pipeline.stages import report as write_report

    opened = Run.open(target)
    if figure is not None and figure.suffix.lower() != ".svg":
        raise CsrError(f"{figure} is not a valid name for a figure", "use a file name that ends in .svg")
    with console.reporter().stage("writing the report", 0):
        written = [write_report(opened)]
        if figure is not None:
            from csr_vlm.report.figure import write_figure
            from csr_vlm.world.truth import known_scene

            written.append(write_figure(opened, figure, known_scene))
    console.done(*written, then=f"open {written[0]} in a browser; it needs no network")


@app.command()
def merge(
    target: RunArgument, out: Annotated[Path | None, typer.Option("--out", help="RUN/model by default.")] = None
) -> None:
    """Write base model plus final adapter as one checkpoint.

    Example: csr merge runs/d0
    """
    opened = Run.open(target)
    adapter = opened.trained_adapter()
    console.quiet_libraries()
    from csr_vlm.training.dpo import merge as merge_adapter

    directory = out or target / "model"
    if out is not None and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CsrError(
            f"{out} is there already", "give a new directory with --out; without it RUN/model is written anew"
        )
    with console.reporter().stage("merging", 0):
        merge_adapter(opened.config.model, adapter, directory)
    console.done(directory, then=f'AutoModelForImageTextToText.from_pretrained("{directory}") loads it')


@app.command()
def env() -> None:
    """Print the versions that results depend on.

    Example: csr env --json
    """
    from csr_vlm.store.run import versions

    found = versions()
    if console.mode.json:
        console.print_json(found)
    else:
        console.print_table("", ["package", "version"], [[name, version] for name, version in found.items()])


app.command("audit")(audit)
app.command("sweep")(sweep)
app.command("compare")(compare)
app.command("compact")(compact)
app.command("watch")(watch)
app.command("analyse")(analyze)
app.command("reproduce")(reproduce)
app.command("export")(export)
app.command()(convert)
app.command()(push)


def main() -> None:
    """Run the command line; what a user can mend is told in three lines, without a traceback."""
    try:
        code = app(prog_name="csr", standalone_mode=False)
    except Stopped:
        raise  # its parting words were said
    except Exception as error:
        error_messages.reporter(error)
        sys.exit(error_messages.exit_code(error))
    if code == INTERRUPTED:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
    sys.exit(code or 0)


def _one_stage(
    stage: str, target: str, overrides: list[str] | None, out: Path | None, iteration: int | None, executor: Executor
) -> None:
    opened = open_or_create(target, overrides, out)
    console.quiet_libraries()
    from csr_vlm.pipeline import stages

    numbers = range(1, opened.config.iterations + 1)
    number = iteration or next((n for n in numbers if not opened.is_done(n, stage)), opened.config.iterations)
    with (
        stoppable(console.reporter(), opened.root) as shown,
        opened.locked(),
        record_progress(opened.root, shown) as reporter,
    ):
        if stage == "generate":
            stages.check_inputs(opened, reporter)
        stages.require_before(opened, number, stage)
        getattr(stages, stage)(opened, number, reporter, executor)
    console.log(f"iteration {number} of {opened.root}: {stage} is done")
    after = {"generate": f"csr pairs {opened.root}", "train": f"csr eval {opened.root}"}[stage]
    console.done(opened.iteration(number), then=after, run=str(opened.root), iteration=number, stage=stage)
