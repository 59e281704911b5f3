"""Write scenes as image files and a prompt file, in the format of user data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt
from csr_vlm.store.files import write_text
from csr_vlm.world.corpus import DESCRIBE
from csr_vlm.world.scenes import Scene, Split, World, all_worlds, make_scenes, parse_scene_id, random_stream, render

PromptKind = Literal["describe", "short", "why"]
"""Kinds of prompts: descriptions, questions with answers of a few words, and questions about reasons."""


def write_prompts(
    world: World, split: Split, seed: int, num_scenes: int, directory: Path, kind: PromptKind = "describe"
) -> Path:
    """Draw scenes into ``directory/images`` and write one prompt for each to ``directory/prompts.jsonl``."""
    scenes = list(make_scenes(world, split, seed, num_scenes))
    prompts = write_images(scenes, directory / "images", kind)
    lines = [
        json.dumps({"prompt_id": p.prompt_id, "image": f"images/{Path(p.image).name}", "text": p.text}) for p in prompts
    ]
    path = directory / "prompts.jsonl"
    write_text(path, "\n".join(lines) + "\n")
    return path


def write_images(scenes: Sequence[Scene], directory: Path, kind: PromptKind = "describe") -> list[Prompt]:
    """Draw scenes as PNG files and return a prompt for each, with the scene's id as its id."""
    directory.mkdir(parents=True, exist_ok=True)
    prompts = []
    for scene in scenes:
        path = directory / f"{scene.scene_id}.png"
        render(scene).save(path)
        prompts.append(Prompt(scene.scene_id, str(path), prompt_text(scene, kind)))
    return prompts


def prompt_text(scene: Scene, kind: PromptKind) -> str:
    """Return a scene's prompt of a kind.

    Raises:
        CsrError: The scene's world has no prompts of this kind; only ``prose`` has short and why-questions.
    """
    rng = random_stream("prompt", scene.scene_id)
    name = scene.scene_id.partition("-")[0]
    if kind == "describe":
        world = all_worlds().get(name)
        wordings = (world and world.describe) or DESCRIBE
        return wordings[rng.integers(len(wordings))]
    from csr_vlm.world.prose_captions import ProseStyle, answer_why, short_questions
    from csr_vlm.world.prose_scenes import ProseScene

    if not isinstance(scene, ProseScene):
        raise CsrError(f"the world {name} has no prompts of the kind {kind!r}", "use the world prose")
    turn = answer_why(scene, ProseStyle(), rng) if kind == "why" else short_questions(scene, rng, 1)[0]
    return turn.question


def scene_of(prompt_id: str) -> tuple[World, Scene] | None:
    """Return the scene with this id and its world; None if the id is not that of a scene."""
    world = all_worlds().get(prompt_id.partition("-")[0])
    if world is None:
        return None
    try:
        return world, parse_scene_id(world, prompt_id)
    except ValueError:
        return None
