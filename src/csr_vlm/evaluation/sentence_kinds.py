"""Split a response into sentences and classify each of them: lead, detail, relation, background, mood or item."""

from __future__ import annotations

import re
from typing import Literal, get_args

from csr_vlm.config.schema import DEFAULT_DELIMITERS
from csr_vlm.method.sentences import SentenceRule

SentenceKind = Literal["lead", "detail", "relation", "background", "item", "mood"]
KINDS: tuple[SentenceKind, ...] = get_args(SentenceKind)
DETAILS: frozenset[SentenceKind] = frozenset({"detail", "relation", "background", "item"})
"""Kinds of sentences that count as details: all but leads and moods."""
_ITEM = re.compile(r"\s*(?:[-*•]|\d+[.)])\s")
_BACKGROUND = re.compile(
    r"\bbackground\b|\b(?:in the distance|further (?:back|away)|far behind|behind all|in the back)\b"
)
_PLACE = (
    r"(?:next to|close to|near|beside|behind|in front of|on top of|on|under|underneath|beneath|above|below|over|between"
    r"|among|around|along|against|inside|(?:to the )?(?:left|right) of|surrounded by|far from)"
)
_RELATION = re.compile(rf"\b{_PLACE}\b")
_REFERS_BACK = re.compile(rf"\b{_PLACE} (?:it|them|him|her|each other|one another)\b")
_RULE = SentenceRule(DEFAULT_DELIMITERS)


def split_sentences(text: str) -> list[str]:
    r"""Split a response at the ends of sentences, by the rule of the search.

    Example:
        >>> split_sentences("A dog runs. Dr. Low sits.\n- A red boat\n- Two trees")
        ['A dog runs.', 'Dr. Low sits.', '- A red boat', '- Two trees']
    """
    return [part for part in _RULE.cut(text) if any(char.isalpha() for char in part)]


def kind_of(sentence: str, position: int, num_objects: int) -> SentenceKind:
    """Classify a sentence of a response by its position, its words and the objects that it names.

    Args:
        sentence: The sentence.
        position: Its index in the response, from 0.
        num_objects: Number of different objects that it names.

    Returns:
        ``lead`` for the first sentence; else ``mood`` if it names no object; ``item`` of a list;
        ``background`` if it says so; ``relation`` if it places two objects, or one and something
        named before, relative to each other; else ``detail``.

    Example:
        >>> kind_of("The mood is calm.", 4, 0), kind_of("A dog lies next to a cat.", 2, 2)
        ('mood', 'relation')
    """
    lowered = sentence.lower()
    if position == 0:
        return "lead"
    if num_objects == 0:
        return "mood"
    if _ITEM.match(sentence):
        return "item"
    if _BACKGROUND.search(lowered):
        return "background"
    is_relation = (num_objects > 1 and _RELATION.search(lowered)) or _REFERS_BACK.search(lowered)
    return "relation" if is_relation else "detail"
