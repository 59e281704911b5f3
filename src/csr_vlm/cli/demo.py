"""Implement ``csr demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from csr_vlm.cli.arguments import Overrides
from csr_vlm.cli.run import align_and_print
from csr_vlm.store.run import Run


def demo(
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of images, search and training.")] = 0,
    out: Annotated[Path, typer.Option("--out", help="Run directory.")] = Path("runs/demo"),
    prompts: Annotated[
        int | None, typer.Option(min=8, help="Number of training images (default: 256; prose: 96).")
    ] = None,
    scenes: Annotated[
        int | None, typer.Option(min=10, help="Number of test scenes (default: 1000; prose: 300).")
    ] = None,
    world: Annotated[str, typer.Option("--world", help="World: harbour or prose.")] = "harbour",
) -> None:
    """Run the method on the embedded world, on a CPU.

    In the embedded world the objects of every image are known, so hallucination is measured exactly.

    Example: csr demo --world prose scorer.use=clip_b iterations=1 --out runs/d0
    """
    from csr_vlm.config.load import load_config
    from csr_vlm.world.demo import demo_settings, demo_size
    from csr_vlm.world.scenes import world_named

    chosen = world_named(world)
    usual = demo_size(chosen)
    settings = demo_settings(out, seed, prompts or usual[0], scenes or usual[1], chosen)
    align_and_print(Run.create(out, load_config(None, overrides or (), base=settings)))
