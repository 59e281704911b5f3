"""Judging a text against the scene it describes."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from csr_vlm.method.reward import bag_of_words
from csr_vlm.world.scenes import Scene, World

_WORD = re.compile(r"[a-z]+")
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


def judge(world: World, scene: Scene, text: str) -> Judgement:
    """Read kinds and the colours before them, sentence by sentence."""
    mentioned: list[str] = []
    right = wrong = 0
    for kind, color in mentions(world, text):
        mentioned.append(kind)
        truth = scene.color_of(kind)
        if truth is not None and color is not None:
            right += color == truth
            wrong += color != truth
    sentences = [part for part in _SENTENCE.findall(text) if part.strip(" .")]
    said = Counter(bag_of_words(sentence) for sentence in sentences)
    return Judgement(
        mentioned=tuple(mentioned),
        hallucinated=tuple(kind for kind in mentioned if kind not in scene.kinds),
        recalled=frozenset(mentioned) & scene.kinds,
        colors_right=right,
        colors_wrong=wrong,
        repeats=sum(said.values()) - len(said),
        words=len(text.split()),
    )


def mentions(world: World, text: str) -> list[tuple[str, str | None]]:
    """List (kind, colour named right before it, if any) in order of appearance."""
    words = _WORD.findall(text.lower())
    return [
        (word, words[at - 1] if at and words[at - 1] in world.colors else None)
        for at, word in enumerate(words)
        if word in world.kinds
    ]


def answers_yes(text: str) -> bool | None:
    """Read a yes or a no at the start of an answer; None if it is neither."""
    first = _WORD.search(text.lower())
    return {"yes": True, "no": False}.get(first.group()) if first else None
