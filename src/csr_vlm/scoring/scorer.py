"""What scores, and several of them in one ledger."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from csr_vlm.errors import CsrError
from csr_vlm.records import Prompt

_SLACK = 1e-3
"""A cosine in half precision may leave -1..1 by so much."""


class Scorer(Protocol):
    """Image-text relevance. A class of your own is called as ``MyScorer(config, device)``.

    ``config`` is its :class:`csr_vlm.config.OneScorerConfig`; ``device`` a torch device's name.
    """

    name: str
    """Its column in the ledger: ``config.name``."""

    def score(self, items: Sequence[tuple[Prompt, str]]) -> Sequence[Mapping[str, float]]:
        """Return ``{name: cosine}`` for each (prompt, sentence), in their order, each in -1..1.

        ``prompt.image`` is the path of the image. R_I (eq. 3) is 100 times the cosine, or 0
        where that is negative.
        """
        ...

    def forget(self) -> None:
        """Drop what is kept about images; called between work items."""
        ...


@runtime_checkable
class LengthLimited(Scorer, Protocol):
    """A scorer whose text tower has a limit."""

    def num_over_length(self, sentences: Iterable[str]) -> int:
        """Count the sentences that the text tower cannot read whole."""
        ...


class ScorerGroup:
    """Several scorers as one: every sentence gets every column, and every value is looked at."""

    def __init__(self, scorers: Sequence[Scorer]) -> None:
        self.scorers = scorers
        self.name = scorers[0].name
        """The first one's column."""

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        """Compute all columns of each item.

        Raises:
            CsrError: A scorer returns anything else than one number in -1..1 an item.
        """
        rows: list[dict[str, float]] = [{} for _ in items]
        for scorer in self.scorers:
            found = scorer.score(items)
            if len(found) != len(items):
                raise CsrError(f"scorer {scorer.name} gave {len(found)} scores for {len(items)} sentences")
            for row, item, scores in zip(rows, items, found, strict=True):
                row[scorer.name] = _checked(scorer.name, item, scores)
        return rows

    def forget(self) -> None:
        for scorer in self.scorers:
            scorer.forget()

    def num_over_length(self, sentences: Sequence[str]) -> dict[str, int]:
        """Count the sentences that each scorer with a limit cannot read whole, by its name."""
        return {s.name: s.num_over_length(sentences) for s in self.scorers if isinstance(s, LengthLimited)}


def _checked(name: str, item: tuple[Prompt, str], scores: Mapping[str, float]) -> float:
    value = scores.get(name, math.nan)
    # Written so that not-a-number fails too.
    if not -1 - _SLACK <= value <= 1 + _SLACK:
        prompt, sentence = item
        raise CsrError(
            f"scorer {name} gives {value} to prompt {prompt.prompt_id}, sentence {sentence!r}",
            f"scores are cosines, in -1..1; look at {prompt.image} and at the scorer's weights",
        )
    return float(value)
