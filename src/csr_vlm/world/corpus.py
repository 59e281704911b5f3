"""What the base models read: captions and questions that carry a language prior.

A caption names the objects in reading order, each with probability ``style.mention``.
Whenever it has named a trigger it goes on, with the pair's probability, to the trigger's
companion, whether the companion is there or not. That co-occurrence habit is what makes
a model trained on the captions hallucinate, and the scenes know when it does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from csr_vlm.world.scenes import Companion, Scene, World, random_stream

DESCRIBE = (
    "Describe the image.",
    "What is in the image?",
    "Describe this image in detail.",
    "What can you see in this picture?",
)
"""Questions that ask for a whole description; CSR's prompts are drawn from them."""


@dataclass(frozen=True)
class Style:
    """How a stretch of the corpus is written."""

    mention: float
    """Probability that a caption names an object that is there."""
    usual_color: float
    """Probability that a companion that is not there gets its usual colour, not any."""
    captions: float
    """Share of captions; the rest are questions."""


@dataclass(frozen=True)
class Turn:
    question: str
    answer: str


def sentence(world: World, *mentions: tuple[str, str]) -> str:
    """Return the sentence that says objects, as (kind, colour), are there."""
    return world.template.format(" and ".join(f"{article(color)} {color} {kind}" for kind, color in mentions))


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def yes_no_question(kind: str) -> str:
    return f"Is there {article(kind)} {kind} in the image?"


def caption(world: World, scene: Scene, style: Style, rng: np.random.Generator) -> str:
    """Write one caption, with the prior."""
    names: dict[str, str] = {}
    for item in scene.objects:
        if item.kind in names or rng.random() >= style.mention:
            continue
        names[item.kind] = item.color
        habit = world.companions.get(item.kind)
        if habit and habit.companion not in names and rng.random() < habit.caption:
            names[habit.companion] = scene.color_of(habit.companion) or _imagined_color(world, habit, style, rng)
    return " ".join(sentence(world, *mentions) for mentions in _grouped(world, list(names.items()), rng))


def _grouped(world: World, names: list[tuple[str, str]], rng: np.random.Generator) -> list[list[tuple[str, str]]]:
    """Put neighbours into one sentence now and then."""
    groups: list[list[tuple[str, str]]] = []
    for name in names:
        if world.joint and groups and len(groups[-1]) == 1 and rng.random() < world.joint:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def _imagined_color(world: World, habit: Companion, style: Style, rng: np.random.Generator) -> str:
    if style.usual_color and rng.random() < style.usual_color:
        return habit.color
    return world.colors[rng.integers(len(world.colors))]


def absent_companions(world: World, scene: Scene) -> dict[str, float]:
    """Map each absent companion of a present trigger to its chance of a false yes."""
    return {
        habit.companion: habit.question
        for kind, habit in world.companions.items()
        if kind in scene.kinds and habit.companion not in scene.kinds
    }


def questions(world: World, scene: Scene, rng: np.random.Generator, num_questions: int) -> list[Turn]:
    """Ask about present objects, absent objects and absent companions, in equal shares.

    Absent companions are answered yes with the pair's probability; everything else is
    answered truthfully.
    """
    tempting = absent_companions(world, scene)
    absent = [kind for kind in world.kinds if kind not in scene.kinds and kind not in tempting]
    turns = []
    for _ in range(num_questions):
        draw = rng.random()
        if tempting and draw < 0.3:
            kind = list(tempting)[rng.integers(len(tempting))]
            answer = rng.random() < tempting[kind]
        elif draw < 0.65:
            kind = scene.objects[rng.integers(len(scene.objects))].kind
            answer = True
        else:
            kind = absent[rng.integers(len(absent))]
            answer = False
        turns.append(Turn(yes_no_question(kind), "Yes." if answer else "No."))
    return turns


def dialogue(world: World, scene: Scene, style: Style, epoch: int) -> list[Turn]:
    """Return one training example for a scene: a description, or four questions."""
    rng = random_stream("dialogue", scene.scene_id, epoch)
    if rng.random() < style.captions:
        return [Turn(DESCRIBE[rng.integers(len(DESCRIBE))], caption(world, scene, style, rng))]
    return questions(world, scene, rng, num_questions=4)
