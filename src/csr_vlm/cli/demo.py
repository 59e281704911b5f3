"""Implement ``csr demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from csr_vlm.cli.run import align_and_print
from csr_vlm.store.run import Run


def demo(
    seed: Annotated[int, typer.Option(min=0, help="Random seed of images, search and training.")] = 0,
    out: Annotated[Path, typer.Option("--out", help="Run directory.")] = Path("runs/demo"),
    prompts: Annotated[int, typer.Option(min=8, help="Number of training images.")] = 256,
    scenes: Annotated[int, typer.Option(min=10, help="Number of test scenes.")] = 1000,
    world: Annotated[str, typer.Option("--world", help="World: harbour or prose.")] = "harbour",
) -> None:
    """Run the method on the embedded world, on a CPU.

    In the embedded world the objects of every image are known, so hallucination is measured exactly.

    Example: csr demo --seed 0 --out runs/d0 --json
    """
    from csr_vlm.world.demo import demo_config
    from csr_vlm.world.scenes import world_named

    align_and_print(Run.create(out, demo_config(out, seed, prompts, scenes, world_named(world))))
