"""Implement ``csr world``: models and images of the embedded worlds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from csr_vlm.cli import console
from csr_vlm.cli.common import Verbs
from csr_vlm.core.errors import CsrError
from csr_vlm.core.seeds import EVALUATION_SEEDS

app = typer.Typer(cls=Verbs, no_args_is_help=True, rich_markup_mode=None, help="Build and export the embedded world.")

WorldName = Annotated[str, typer.Option("--world", help="World: harbour, market or prose.")]


@app.command("build")
def world_build(
    out: Annotated[Path, typer.Option("--out", help="Directory for clip/, llava/ and build.json.")],
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    world: WorldName = "harbour",
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only, to see that it works.")] = False,
) -> None:
    """Train the base models as the shipped ones were trained.

    Example: csr world build --out /tmp/world --seed 0
    """
    console.quiet_libraries()
    from dataclasses import replace

    from csr_vlm.world.build import BuildPlan, build_with_progress
    from csr_vlm.world.scenes import world_named

    if world == "prose":
        _build_prose(out, seed, quick)
        return
    plan = BuildPlan(seed=seed)
    if quick:
        phases = tuple(replace(phase, steps=60) for phase in plan.policy_phases)
        plan = replace(plan, scorer_steps=60, policy_phases=phases)
    build_with_progress(world_named(world), out, plan, console.reporter())
    console.done(out, then=f"csr world check {out}")


def _build_prose(out: Path, seed: int, quick: bool) -> None:
    from csr_vlm.world.prose_build import ProsePlan, build_prose_with_progress

    plan = ProsePlan(seed=seed)
    build_prose_with_progress(out, plan.shortened(60) if quick else plan, console.reporter())
    console.done(out, then=f"csr world check {out} --world prose")


@app.command("check")
def world_check(
    directory: Annotated[
        Path | None, typer.Argument(help="Directory with clip/ and llava/ (default: shipped models).")
    ] = None,
    scenes: Annotated[int, typer.Option(min=10, help="Number of test scenes; of prose, development scenes.")] = 1000,
    world: WorldName = "harbour",
) -> None:
    """Evaluate the scorer and the base model.

    Of prose, show every number beside its bound; exit with 1 if one is not met.
    Example: csr world build --out build/world && csr world check build/world
    """
    if directory is not None and not all((directory / part).is_dir() for part in ("clip", "llava")):
        raise CsrError(
            f"{directory} is not a world: clip/ or llava/ is missing", "csr world build --out DIR builds one"
        )
    console.quiet_libraries()
    from csr_vlm.world.check import check_models
    from csr_vlm.world.demo import assets_of
    from csr_vlm.world.scenes import world_named

    chosen = world_named(world)
    if world == "prose":
        _check_prose(directory or assets_of(chosen), scenes)
        return
    metrics = check_models(chosen, directory or assets_of(chosen), scenes, console.reporter())
    if console.mode.json:
        console.print_json(metrics)
        return
    console.print_table("", ["scorer", ""], [[name, f"{value:.4f}"] for name, value in metrics["scorer"].items()])
    print()
    console.print_metrics("", {0: metrics["policy"]})


def _check_prose(directory: Path, scenes: int) -> None:
    """Print every number of the world prose with its bound; exit with 1 if a bound is missed."""
    from csr_vlm.world.prose_check import check_prose

    result = check_prose(directory, scenes, 10_001, console.reporter())
    if console.mode.json:
        console.print_json(result)
    else:
        judges = result["judges"]
        values = [[name, *(f"{judges[judge][name]:.3f}" for judge in judges)] for name in judges["clip"]]
        console.print_metrics("", {0: result["policy"]})
        print()
        console.print_table("", ["judge", *judges], values)
        print()
        rows = [
            [
                bound["name"],
                *(_number(bound[key]) for key in ("value", "low", "high")),
                "met" if bound["met"] else "MISSED",
            ]
            for bound in result["bounds"]
        ]
        console.print_table("", ["number", "value", "at least", "at most", ""], rows)
    if not all(bound["met"] for bound in result["bounds"]):
        raise typer.Exit(1)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@app.command("export")
def world_export(
    out: Annotated[Path, typer.Argument(help="Directory for the models, images and prompts.jsonl.")],
    prompts: Annotated[int, typer.Option(min=1, help="Number of images.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the images.")] = 0,
    world: WorldName = "harbour",
    kind: Annotated[
        Literal["describe", "short", "why"],
        typer.Option("--kind", help="Prompts: descriptions; of prose, also short-answer or why-questions."),
    ] = "describe",
) -> None:
    """Write the models and images in the formats of real ones.

    Example: csr world export world && csr run quickstart
    """
    from csr_vlm.world.demo import export_world
    from csr_vlm.world.scenes import world_named

    with console.reporter().stage("drawing images", 0):
        written = export_world(out, seed, prompts, world_named(world), kind)
    console.done(written, then="csr run quickstart (which expects the export in ./world)")


@app.command("coco")
def world_coco(
    out: Annotated[Path, typer.Argument(help="Directory for annotations, synonyms, questions and images.")],
    scenes: Annotated[int, typer.Option(min=10, help="Number of scenes.")] = 1000,
    world_seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Random seed of the scenes: 0 to 9999 for test (default 1), then to 19999 for development."
        ),
    ] = None,
    split: Annotated[Literal["development", "test"], typer.Option(help="Split of the scenes.")] = "test",
    world: WorldName = "harbour",
) -> None:
    """Write scenes in COCO's format, for eval chair and pope.

    Example: csr world coco scenes --scenes 500
    """
    from csr_vlm.world.coco import write_coco
    from csr_vlm.world.scenes import Split, world_named

    with console.reporter().stage("drawing images", 0):
        seed = EVALUATION_SEEDS[split][1] if world_seed is None else world_seed
        write_coco(world_named(world), Split(split), seed, scenes, out)
    console.done(out, then=f"csr eval answer RUN --prompts {out}/prompts.jsonl --out captions.jsonl")
