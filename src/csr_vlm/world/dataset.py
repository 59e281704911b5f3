"""Write scenes as image files and a prompt file, in the format of user data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from csr_vlm.core.records import Prompt
from csr_vlm.store.files import write_text
from csr_vlm.world.corpus import DESCRIBE
from csr_vlm.world.scenes import Scene, Split, World, all_worlds, make_scenes, parse_scene_id, random_stream, render


def write_prompts(world: World, split: Split, seed: int, num_scenes: int, directory: Path) -> Path:
    """Draw scenes into ``directory/images`` and write one prompt for each to ``directory/prompts.jsonl``."""
    scenes = list(make_scenes(world, split, seed, num_scenes))
    prompts = write_images(scenes, directory / "images")
    lines = [
        json.dumps({"prompt_id": p.prompt_id, "image": f"images/{Path(p.image).name}", "text": p.text}) for p in prompts
    ]
    path = directory / "prompts.jsonl"
    write_text(path, "\n".join(lines) + "\n")
    return path


def write_images(scenes: Sequence[Scene], directory: Path) -> list[Prompt]:
    """Draw scenes as PNG files and return a description prompt for each, with the scene's id as its id."""
    directory.mkdir(parents=True, exist_ok=True)
    prompts = []
    for scene in scenes:
        path = directory / f"{scene.scene_id}.png"
        render(scene).save(path)
        world = all_worlds().get(scene.scene_id.partition("-")[0])
        wordings = (world and world.describe) or DESCRIBE
        question = wordings[random_stream("prompt", scene.scene_id).integers(len(wordings))]
        prompts.append(Prompt(scene.scene_id, str(path), question))
    return prompts


def scene_of(prompt_id: str) -> tuple[World, Scene] | None:
    """Return the scene with this id and its world; None if the id is not that of a scene."""
    world = all_worlds().get(prompt_id.partition("-")[0])
    if world is None:
        return None
    try:
        return world, parse_scene_id(world, prompt_id)
    except ValueError:
        return None
