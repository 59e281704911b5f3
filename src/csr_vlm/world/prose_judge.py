"""Train the judges of ``prose``: CLIP models that learn from short alt texts, stopped early.

An alt text names one or two of the groups in a picture, larger ones more often, and half the time
the place. So a judge recognizes places and large objects well and small ones poorly, and it never
saw the wordings of descriptions. Like CLIP, it prefers summaries to details.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import CLIPModel

from csr_vlm.core.formatting import article
from csr_vlm.world.build import Progress, pixels, train_loop
from csr_vlm.world.prose_captions import side_of
from csr_vlm.world.prose_scenes import PROSE, SETTINGS, SYNONYMS, Group, ProseScene
from csr_vlm.world.prose_wordings import ANYWHERE, SIDES, plural
from csr_vlm.world.scenes import Scene, Split, make_scene, random_stream

ALT_TEXTS = (
    "{things}",
    "a photo of {things}",
    "a picture of {things}",
    "an image of {things}",
    "{things} in a photo",
    "{things} {side}",
    "{things} that can be seen {side}",
    "we see {things} {side}",
    "also {things} {side}",
)
ALT_TEXTS_WITH_PLACE = (
    "{things} {place}",
    "a {scene} scene with {things}",
    "a photo of {things} {place}",
    "a picture of {things} taken {place}",
)
_BETWEEN = (" and ", " and ", " with ", " next to ", " near ", ", with ", " beside ")
"""Words between the two things of an alt text."""
NUM_SETTINGS = 4
"""Number of settings in a batch: among pictures of the same place only objects tell them apart."""
_WORDS_OF = {line[0]: line for line in SYNONYMS}


@dataclass(frozen=True)
class AltTextStyle:
    """Configure the alt texts of a judge: probabilities of naming two things, the place, and a color.

    The more alt texts name the place, the more a judge prefers summaries to details.
    """

    two: float = 0.6
    place: float = 0.7
    color: float = 0.25


def alt_text(scene: ProseScene, style: AltTextStyle, rng: np.random.Generator) -> str:
    """Return a short text that names one or two groups, drawn with weights that grow with their size."""
    weights = np.array([(group.size * group.count**0.5) ** 0.5 for group in scene.groups])
    number = 1 + int(rng.random() < style.two)
    drawn = rng.choice(len(scene.groups), size=number, replace=False, p=weights / weights.sum())
    between = _BETWEEN[rng.integers(len(_BETWEEN))]
    things = between.join(_phrase(scene.groups[index], style.color, rng) for index in drawn)
    sides = SIDES[side_of(*scene.groups[drawn[0]].center)] if number == 1 else ANYWHERE
    forms = ALT_TEXTS_WITH_PLACE if rng.random() < style.place else ALT_TEXTS
    setting = SETTINGS[scene.setting]
    return forms[rng.integers(len(forms))].format(
        things=things, side=sides[rng.integers(len(sides))], place=setting.place, scene=setting.scene
    )


def _phrase(group: Group, color: float, rng: np.random.Generator) -> str:
    """Return a noun phrase for a group: "a boat", "two red chairs", "shells"."""
    options = _WORDS_OF[group.kind]
    word = options[rng.integers(len(options))] if rng.random() < 0.4 else options[0]
    adjective = f"{group.color} " if rng.random() < color else ""
    if group.count > 1:
        number = ("two ", "three ")[group.count - 2] if rng.random() < 0.5 else ""
        return f"{number}{adjective}{plural(word)}"
    return f"{article(adjective or word)} {adjective}{word}"


def batches_of_few_settings(seed: int, batch: int, steps: int, start: int) -> Iterator[list[Scene]]:
    """Yield one list of corpus scenes per step, beginning at the scene ``start``, each of a few settings only."""
    index = start
    for step in range(steps):
        wanted = random_stream("settings", seed, start, step).permutation(np.array(list(SETTINGS)))[:NUM_SETTINGS]
        scenes: list[Scene] = []
        while len(scenes) < batch:
            scene = make_scene(PROSE, Split.CORPUS, seed, index)
            index += 1
            if isinstance(scene, ProseScene) and scene.setting in wanted:
                scenes.append(scene)
        yield scenes


def train_judge(
    model: CLIPModel,
    processor: Any,
    batches: Any,
    style: AltTextStyle,
    stream: int,
    steps: int,
    stop: int,
    lr: float,
    warmup: int,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Train with CLIP's loss, the mean of the image-to-text and text-to-image cross-entropies of a batch.

    The temperature starts at 1/14.

    Args:
        style: Style of the alt texts.
        stream: Random stream of the alt texts.
        steps: Steps of the learning rate's cosine schedule.
        stop: Step after which training stops early.
    """
    with torch.no_grad():
        model.logit_scale.fill_(np.log(14.0))

    def loss_of(scenes: list[Scene], step: int) -> torch.Tensor:
        texts = [
            alt_text(scene, style, random_stream("alt text", stream, step, scene.scene_id))
            for scene in scenes
            if isinstance(scene, ProseScene)
        ]
        tokens = processor.tokenizer(texts, padding=True, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            image = model.get_image_features(pixel_values=pixels(scenes)).pooler_output
            text = model.get_text_features(**tokens).pooler_output
        image, text = (functional.normalize(side.float(), dim=-1) for side in (image, text))
        logits = model.logit_scale.exp().clamp(max=100) * image @ text.T
        target = torch.arange(len(scenes))
        return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2

    return train_loop("judge", model, islice(batches, stop), loss_of, [], steps, lr, warmup, progress, checkpoint)
