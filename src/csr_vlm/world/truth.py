"""Judging a text against the scene it describes."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

from csr_vlm.evaluation import chair
from csr_vlm.evaluation.objects import ObjectMentions, ObjectTable, find_objects
from csr_vlm.evaluation.words import word_rule
from csr_vlm.method.reward import bag_of_words
from csr_vlm.world.dataset import scene_of
from csr_vlm.world.scenes import Scene, World, render

_SENTENCE = re.compile(r"[^.]*\.?")


@dataclass(frozen=True)
class Judgement:
    """What a text says about a scene, and how much of it is so."""

    mentioned: tuple[str, ...]
    """Kinds named, in order, repetitions included."""
    hallucinated: tuple[str, ...]
    """Those of them that are not in the scene."""
    recalled: frozenset[str]
    """Kinds of the scene that are named."""
    colors_right: int
    """Mentions of present kinds with their true colour."""
    colors_wrong: int
    """Mentions of present kinds with another colour."""
    repeats: int
    """Sentences that say again what an earlier one said."""
    words: int


@dataclass(frozen=True)
class KnownScene:
    """A scene as reports see it: a :class:`csr_vlm.evaluation.known_pictures.KnownPicture`."""

    world: World
    scene: Scene

    @property
    def description(self) -> str:
        return "Drawn scene: " + ", ".join(f"{item.color} {item.kind}" for item in self.scene.objects)

    @property
    def absent(self) -> frozenset[str]:
        return frozenset(self.world.kinds) - self.scene.kinds

    def draw(self, scale: int) -> Image.Image:
        return render(self.scene, scale=scale)

    def hallucinated(self, text: str) -> tuple[str, ...]:
        return judge(self.world, self.scene, text).hallucinated

    def unmentioned(self, text: str) -> list[str]:
        return sorted(self.scene.kinds - judge(self.world, self.scene, text).recalled)


def known_scene(prompt_id: str) -> KnownScene | None:
    """Return the scene that a prompt id names; None if it names none."""
    found = scene_of(prompt_id)
    return None if found is None else KnownScene(*found)


def reader_of(world: World) -> chair.ObjectReader:
    """Return CHAIR's reader for a world.

    A kind is named by its own word and by no other, unless the world has synonyms: then the words
    of the table count, their plurals too, by the word rule ``pattern``.
    """
    return _reader(world.kinds, world.synonyms)


@lru_cache(maxsize=8)
def _reader(kinds: tuple[str, ...], synonyms: tuple[tuple[str, ...], ...]) -> chair.ObjectReader:
    table = ObjectTable.of(synonyms or [[kind] for kind in kinds], of_coco=False)
    return chair.ObjectReader(word_rule("pattern" if synonyms else "plain"), table)


def judge(world: World, scene: Scene, text: str) -> Judgement:
    """Judge the kinds that a text names by CHAIR, and besides the colours before them and its repeats."""
    reading, colors = _read(world, text)
    verdict = chair.check_mentions(reading, scene.kinds)
    claims = [(scene.color_of(kind), color) for kind, color in zip(reading.objects, colors, strict=True)]
    compared = [truth == color for truth, color in claims if truth is not None and color is not None]
    sentences = [part for part in _SENTENCE.findall(text) if part.strip(" .")]
    said = Counter(bag_of_words(sentence) for sentence in sentences)
    return Judgement(
        mentioned=verdict.mentioned,
        hallucinated=verdict.hallucinated,
        recalled=verdict.recalled,
        colors_right=sum(compared),
        colors_wrong=len(compared) - sum(compared),
        repeats=sum(said.values()) - len(said),
        words=len(text.split()),
    )


def mentions(world: World, text: str) -> list[tuple[str, str | None]]:
    """List (kind, colour named right before it, if any) in order of appearance."""
    reading, colors = _read(world, text)
    return list(zip(reading.objects, colors, strict=True))


def _read(world: World, text: str) -> tuple[ObjectMentions, list[str | None]]:
    reader = reader_of(world)
    words = reader.rule.read(text)
    reading = find_objects(words, reader.table)
    before = [words[at - 1] if at else "" for at in reading.positions]
    return reading, [word if word in world.colors else None for word in before]
