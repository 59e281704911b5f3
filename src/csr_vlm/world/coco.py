"""Write scenes in COCO's format, so that the code of CHAIR and POPE can evaluate on the world.

    DIR/annotations/instances_SPLIT.json    objects with bounding boxes
    DIR/synonyms.txt                        one line per kind
    DIR/pope_{random,popular,adversarial}.jsonl
    DIR/prompts.jsonl, DIR/images/          prompts and images for a policy

``csr eval chair`` on these files, with the word rule ``plain``, and ``csr eval world`` call
the same functions and yield the same metrics for the same texts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csr_vlm.evaluation.pope import SETTINGS
from csr_vlm.evaluation.pope_build import Scenery, build_questions, rows
from csr_vlm.store.files import write_json, write_text
from csr_vlm.world.dataset import write_prompts
from csr_vlm.world.scenes import Scene, Split, World, check_for_evaluation, make_scenes

_PER_IMAGE = 2
"""Number of POPE questions with each answer per image; every scene has at least two objects."""


def write_coco(world: World, split: Split, seed: int, num_scenes: int, directory: Path) -> None:
    """Write scenes, their annotations, questions and images below a directory.

    Raises:
        CsrError: The split is used for training, or the seed belongs to the other split.
    """
    check_for_evaluation(split, seed)
    scenes = list(make_scenes(world, split, seed, num_scenes))
    write_prompts(world, split, seed, num_scenes, directory)
    write_json(directory / "annotations" / f"instances_{split.value}.json", instances(world, scenes))
    write_text(directory / "synonyms.txt", synonyms(world))
    scenery = Scenery({_file_name(scene): scene.kinds for scene in scenes}, world.kinds)
    for setting in SETTINGS:
        questions = build_questions(scenery, setting, num_images=num_scenes, per_image=_PER_IMAGE, seed=seed)
        question_rows = [{**row, "image": f"images/{row['image']}"} for row in rows(questions)]
        write_text(directory / f"pope_{setting}.jsonl", "".join(json.dumps(row) + "\n" for row in question_rows))


def instances(world: World, scenes: Sequence[Scene]) -> dict[str, Any]:
    """Return the scenes as a COCO instance file: boxes are [left, top, width, height] in pixels."""
    category = {kind: index for index, kind in enumerate(world.kinds, start=1)}
    annotations: list[dict[str, Any]] = []
    for image_id, scene in enumerate(scenes, start=1):
        for item in scene.objects:
            left, top = item.corner
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category[item.kind],
                    "bbox": [left, top, item.size, item.size],
                    "area": item.size**2,
                    "iscrowd": 0,
                    "attributes": {"color": item.color},
                }
            )
    return {
        "info": {"description": f"scenes of the world {world.name}"},
        "images": [
            {"id": image_id, "file_name": _file_name(scene), "width": world.side, "height": world.side}
            for image_id, scene in enumerate(scenes, start=1)
        ],
        "categories": [{"id": index, "name": kind} for kind, index in category.items()],
        "annotations": annotations,
    }


def synonyms(world: World) -> str:
    """Return the world's synonym file; a world without synonyms has one line per kind with its name only."""
    lines = world.synonyms or tuple((kind,) for kind in world.kinds)
    return "".join(", ".join(line) + "\n" for line in lines)


def _file_name(scene: Scene) -> str:
    return f"{scene.scene_id}.png"
