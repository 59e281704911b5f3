"""Sentences on the page: what is not in the picture is marked, relevance is a colour and a number."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from csr_vlm.report.limits import cut

SCALE_STEPS = 7
_ABSENT = Markup(
    '<mark class="absent" title="not in the picture">{}<span class="spoken"> (not in the picture)</span></mark>'
)


@dataclass(frozen=True)
class Sentence:
    markup: Markup
    relevance: float | None
    """R_I, 0 to 100; None where it was not measured."""
    shared: bool = False
    """Whether the other side of the pair says it too, up to here."""


@dataclass(frozen=True)
class Scale:
    """Which colour step a relevance has; the ends are the gallery's own extremes."""

    low: float
    high: float

    @classmethod
    def of(cls, sentences: Iterable[Sentence]) -> Scale:
        """Span the sentences' relevances."""
        ordered = sorted(s.relevance for s in sentences if s.relevance is not None) or [0.0]
        # A few outliers must not wash out everybody else.
        edge = len(ordered) // 50
        return cls(ordered[edge], ordered[-1 - edge])

    def step(self, value: float) -> int:
        if self.high <= self.low:
            return SCALE_STEPS // 2
        return max(0, min(int((value - self.low) / (self.high - self.low) * SCALE_STEPS), SCALE_STEPS - 1))


def sentences(
    rows: Iterable[tuple[str, float | None]], absent: Collection[str], num_shared: int = 0
) -> Sequence[Sentence]:
    """Mark (text, R_I) rows, the first ``num_shared`` as shared; those without a word are left out."""
    return [
        Sentence(marked(text, absent), relevance, place < num_shared)
        for place, (text, relevance) in enumerate(rows)
        if text
    ]


def marked(text: str, absent: Collection[str]) -> Markup:
    """Escape a text and mark its words, singular or plural, that name something absent.

    Example:
        >>> marked("Two cups & a red cupboard.", {"cup"}).striptags()
        'Two cups (not in the picture) & a red cupboard.'
    """
    text = cut(text)
    if not absent:
        return escape(text)
    names = "|".join(re.escape(name) for name in sorted(absent, key=len, reverse=True))
    parts: list[Markup] = []
    at = 0
    for found in re.finditer(rf"(?<!\w)(?:{names})(?:e?s)?(?!\w)", text, re.IGNORECASE):
        parts += [escape(text[at : found.start()]), _ABSENT.format(found.group())]
        at = found.end()
    return Markup("").join([*parts, escape(text[at:])])
