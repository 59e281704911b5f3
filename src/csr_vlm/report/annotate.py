"""Annotate sentences: mark hallucinated objects and claims by their evidence, color by image-text relevance."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from csr_vlm.core.formatting import signed
from csr_vlm.method.claim_places import Level, claim_places, level_of
from csr_vlm.method.claims import ClaimFinder
from csr_vlm.report.limits import shorten

NUM_COLORS = 7
"""Steps of the color scale; the style sheet has a color for each."""
_ABSENT = Markup(
    '<mark class="absent" title="not in the image">{}<span class="spoken"> (not in the image)</span></mark>'
)
MEANINGS = {
    Level.SUPPORTED: "evidence for it",
    Level.UNCLEAR: "hardly any evidence either way",
    Level.DOUBTED: "evidence against it",
}
_CLAIM = Markup('<span class="claim {}" title="{}">{}<span class="spoken"> ({})</span></span>')


@dataclass(frozen=True)
class AnnotatedSentence:
    """Represent a sentence as the page shows it."""

    markup: Markup
    relevance: float | None
    """R_I, 0 to 100; None if it was not measured."""
    in_both: bool = False
    """Whether the chosen and the rejected response both start with the sentences up to this one."""
    reward: float | None = None
    """R(s), where claims are marked instead of the relevance of the whole sentence."""


@dataclass(frozen=True)
class ColorScale:
    """Map R_I to a color; the ends are the extremes of a gallery."""

    low: float
    high: float

    @classmethod
    def of(cls, sentences: Iterable[AnnotatedSentence]) -> ColorScale:
        """Span the relevance of some sentences, without the most extreme 2 % at either end."""
        relevances = sorted(s.relevance for s in sentences if s.relevance is not None) or [0.0]
        # Without the cut, a few outliers would leave all other sentences in one color.
        num_cut = len(relevances) // 50
        return cls(relevances[num_cut], relevances[-1 - num_cut])

    def color(self, relevance: float) -> int:
        """Return the color of a sentence, from 0 to ``NUM_COLORS`` - 1."""
        if self.high <= self.low:
            return NUM_COLORS // 2
        return max(0, min(int((relevance - self.low) / (self.high - self.low) * NUM_COLORS), NUM_COLORS - 1))


def annotate(
    rows: Iterable[tuple[str, float | None]], absent: Collection[str], num_in_both: int = 0
) -> Sequence[AnnotatedSentence]:
    """Annotate (text, R_I) rows, the first ``num_in_both`` as part of both responses; empty texts are left out."""
    return [
        AnnotatedSentence(mark_absent(text, absent), relevance, index < num_in_both)
        for index, (text, relevance) in enumerate(rows)
        if text
    ]


def absent_spans(text: str, absent: Collection[str]) -> list[tuple[int, int]]:
    """Return the (start, end) offsets of the words, singular or plural, that name an absent object.

    Example:
        >>> absent_spans("Two cups & a red cupboard.", {"cup"})
        [(4, 8)]
    """
    if not absent:
        return []
    names = "|".join(re.escape(name) for name in sorted(absent, key=len, reverse=True))
    return [match.span() for match in re.finditer(rf"(?<!\w)(?:{names})(?:e?s)?(?!\w)", text, re.IGNORECASE)]


def mark_absent(text: str, absent: Collection[str]) -> Markup:
    """Escape a text and mark the words that name an absent object.

    Example:
        >>> mark_absent("Two cups & a red cupboard.", {"cup"}).striptags()
        'Two cups (not in the image) & a red cupboard.'
    """
    text = shorten(text)
    parts: list[Markup] = []
    position = 0
    for start, end in absent_spans(text, absent):
        parts += [escape(text[position:start]), _ABSENT.format(text[start:end])]
        position = end
    return Markup("").join([*parts, escape(text[position:])])


def mark_claims(text: str, evidence: Mapping[str, float], finder: ClaimFinder, absent: Collection[str]) -> Markup:
    """Escape a sentence; mark its claims by their evidence in nats, and the words that name an absent object.

    Example:
        >>> from csr_vlm.method.claims import claim_finder
        >>> mark_claims("A boat & a fish.", {"boat": 2.0, "fish": -1.5}, claim_finder(), {"fish"}).striptags()
        'A boat (+2.0 nats: evidence for it) & a fish (not in the image) (−1.5 nats: evidence against it).'
    """
    text, position, parts = shorten(text), 0, list[Markup]()
    for start, end, claim in claim_places(text, finder.find(text)):
        if claim not in evidence:
            continue
        level = level_of(evidence[claim])
        title = f"{signed(evidence[claim], 1)} nats: {MEANINGS[level]}"
        marked = _CLAIM.format(level, title, mark_absent(text[start:end], absent), title)
        parts += [mark_absent(text[position:start], absent), marked]
        position = end
    return Markup("").join([*parts, mark_absent(text[position:], absent)])
