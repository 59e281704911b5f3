"""Annotate sentences: mark hallucinated objects, color sentences by image-text relevance."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from csr_vlm.report.limits import shorten

NUM_COLORS = 7
"""Steps of the color scale; the style sheet has a color for each."""
_ABSENT = Markup(
    '<mark class="absent" title="not in the image">{}<span class="spoken"> (not in the image)</span></mark>'
)


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
