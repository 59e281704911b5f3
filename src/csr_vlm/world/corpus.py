"""Write the training corpus of the base models: captions and questions with a co-occurrence bias.

A caption names the objects of a scene in reading order, each with probability
``style.mention``. After a trigger it names the trigger's companion with the probability of
the pair, whether or not the companion is in the scene. Models trained on such captions
hallucinate companions, and the scenes show when they do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from csr_vlm.core.formatting import article
from csr_vlm.world.scenes import Companion, Scene, World, random_stream

DESCRIBE = (
    "Describe the image.",
    "What is in the image?",
    "Describe this image in detail.",
    "What can you see in this picture?",
)
"""Prompts for a description of the whole image; CSR's prompts are drawn from them."""


@dataclass(frozen=True)
class Style:
    """Configure how captions and questions are written."""

    mention: float
    """Probability that a caption names an object of the scene."""
    usual_color: float
    """Probability that an absent companion is given its usual color instead of a random one."""
    captions: float
    """Share of captions; the rest are questions."""


@dataclass(frozen=True)
class Turn:
    question: str
    answer: str


def sentence(world: World, *mentions: tuple[str, str]) -> str:
    """Return a caption sentence that names objects, given as (kind, color)."""
    return world.template.format(" and ".join(f"{article(color)} {color} {kind}" for kind, color in mentions))


def yes_no_question(kind: str) -> str:
    return f"Is there {article(kind)} {kind} in the image?"


def caption(world: World, scene: Scene, style: Style, rng: np.random.Generator) -> str:
    """Write one caption with the co-occurrence bias."""
    color_of: dict[str, str] = {}
    for item in scene.objects:
        if item.kind in color_of or rng.random() >= style.mention:
            continue
        color_of[item.kind] = item.color
        prior = world.companions.get(item.kind)
        if prior and prior.companion not in color_of and rng.random() < prior.caption:
            color_of[prior.companion] = scene.color_of(prior.companion) or _imagined_color(world, prior, style, rng)
    return " ".join(sentence(world, *mentions) for mentions in _grouped(world, list(color_of.items()), rng))


def _grouped(world: World, mentions: list[tuple[str, str]], rng: np.random.Generator) -> list[list[tuple[str, str]]]:
    """Group mentions into sentences: two consecutive ones share a sentence with probability ``world.joint``."""
    groups: list[list[tuple[str, str]]] = []
    for mention in mentions:
        if world.joint and groups and len(groups[-1]) == 1 and rng.random() < world.joint:
            groups[-1].append(mention)
        else:
            groups.append([mention])
    return groups


def _imagined_color(world: World, prior: Companion, style: Style, rng: np.random.Generator) -> str:
    if style.usual_color and rng.random() < style.usual_color:
        return prior.color
    return world.colors[rng.integers(len(world.colors))]


def absent_companions(world: World, scene: Scene) -> dict[str, float]:
    """Map each absent companion of a present trigger to the probability that its question is answered yes."""
    return {
        prior.companion: prior.question
        for kind, prior in world.companions.items()
        if kind in scene.kinds and prior.companion not in scene.kinds
    }


def questions(world: World, scene: Scene, rng: np.random.Generator, num_questions: int) -> list[Turn]:
    """Draw questions about present objects, absent objects and absent companions, and answer them.

    The answer about an absent companion is yes with the probability of its pair; all other
    answers are correct.
    """
    companions = absent_companions(world, scene)
    absent = [kind for kind in world.kinds if kind not in scene.kinds and kind not in companions]
    turns = []
    for _ in range(num_questions):
        draw = rng.random()
        if companions and draw < 0.3:
            kind = list(companions)[rng.integers(len(companions))]
            answer = rng.random() < companions[kind]
        elif draw < 0.65:
            kind = scene.objects[rng.integers(len(scene.objects))].kind
            answer = True
        else:
            kind = absent[rng.integers(len(absent))]
            answer = False
        turns.append(Turn(yes_no_question(kind), "Yes." if answer else "No."))
    return turns


def dialogue(world: World, scene: Scene, style: Style, epoch: int) -> list[Turn]:
    """Return one training example for a scene: a caption or four questions."""
    rng = random_stream("dialogue", scene.scene_id, epoch)
    if rng.random() < style.captions:
        return [Turn(DESCRIBE[rng.integers(len(DESCRIBE))], caption(world, scene, style, rng))]
    return questions(world, scene, rng, num_questions=4)
