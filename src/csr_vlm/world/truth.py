"""Compare a text with the scene that it describes."""

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
    """Hold the objects that a text mentions and the comparison with its scene."""

    mentioned: tuple[str, ...]
    """Mentioned kinds in order, with repetitions."""
    hallucinated: tuple[str, ...]
    """Mentioned kinds that are not in the scene, in order, with repetitions."""
    recalled: frozenset[str]
    """Kinds of the scene that are mentioned."""
    colors_right: int
    """Number of mentions of present kinds with the correct color."""
    colors_wrong: int
    """Number of mentions of present kinds with a wrong color."""
    repeats: int
    """Number of sentences with the same words as an earlier sentence."""
    words: int
    """Number of words of the text."""


@dataclass(frozen=True)
class KnownScene:
    """Implement :class:`csr_vlm.evaluation.known_pictures.KnownPicture` for a scene."""

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
    """Return the scene with this prompt id; None if the id is not that of a scene."""
    world_and_scene = scene_of(prompt_id)
    return None if world_and_scene is None else KnownScene(*world_and_scene)


def reader_of(world: World) -> chair.ObjectReader:
    """Return CHAIR's object reader for a world.

    Without synonyms, the name of a kind is its only word. With synonyms, the words of the table and
    their plurals count, by the word rule ``pattern``.
    """
    return _reader(world.kinds, world.synonyms)


@lru_cache(maxsize=8)
def _reader(kinds: tuple[str, ...], synonyms: tuple[tuple[str, ...], ...]) -> chair.ObjectReader:
    table = ObjectTable.of(synonyms or [[kind] for kind in kinds], of_coco=False)
    return chair.ObjectReader(word_rule("pattern" if synonyms else "plain"), table)


def judge(world: World, scene: Scene, text: str) -> Judgement:
    """Count hallucinated and recalled kinds as CHAIR does, and correct colors and repeated sentences."""
    object_mentions, colors = _read(world, text)
    checked = chair.check_mentions(object_mentions, scene.kinds)
    pairs = [(scene.color_of(kind), color) for kind, color in zip(object_mentions.objects, colors, strict=True)]
    matches = [truth == color for truth, color in pairs if truth is not None and color is not None]
    sentences = [part for part in _SENTENCE.findall(text) if part.strip(" .")]
    counts = Counter(bag_of_words(sentence) for sentence in sentences)
    return Judgement(
        mentioned=checked.mentioned,
        hallucinated=checked.hallucinated,
        recalled=checked.recalled,
        colors_right=sum(matches),
        colors_wrong=len(matches) - sum(matches),
        repeats=sum(counts.values()) - len(counts),
        words=len(text.split()),
    )


def mentions(world: World, text: str) -> list[tuple[str, str | None]]:
    """List the mentioned kinds in order, each with the color named directly before it, if any."""
    object_mentions, colors = _read(world, text)
    return list(zip(object_mentions.objects, colors, strict=True))


def _read(world: World, text: str) -> tuple[ObjectMentions, list[str | None]]:
    reader = reader_of(world)
    words = reader.rule.read(text)
    object_mentions = find_objects(words, reader.table)
    preceding = [words[index - 1] if index else "" for index in object_mentions.positions]
    return object_mentions, [word if word in world.colors else None for word in preceding]
