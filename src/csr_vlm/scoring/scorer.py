"""What scores, and several of them in one ledger."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Protocol, runtime_checkable

from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt, negatives_column

_SLACK = 1e-3
"""A cosine in half precision may leave -1..1 by so much."""


class Scorer(Protocol):
    """Image-text relevance. A class of your own is called as ``MyScorer(config, device)``.

    ``config`` is its :class:`csr_vlm.config.schema.OneScorerConfig`; ``device`` a torch device's name.
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
        self._others: dict[str, list[Prompt]] = {}

    def set_negative_images(self, prompts: Sequence[Prompt], num_others: int) -> None:
        """From now on also score every sentence against ``num_others`` other images of these prompts.

        A prompt's others are the next distinct images in the order given, so they depend on
        the work item and on nothing else. The mean goes to :func:`others_column`.
        """
        by_image = list({prompt.image: prompt for prompt in prompts}.values())
        place = {prompt.image: at for at, prompt in enumerate(by_image)}
        ring = by_image * 2
        number = min(num_others, len(by_image) - 1)
        self._others = {image: ring[at + 1 : at + 1 + number] for image, at in place.items() if number > 0}

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        """Compute all columns of each item.

        Raises:
            CsrError: A scorer returns anything else than one number in -1..1 an item.
        """
        others = [[(other, sentence) for other in self._others.get(p.image, ())] for p, sentence in items]
        flat = [item for mine in others for item in mine]
        rows: list[dict[str, float]] = [{} for _ in items]
        for scorer in self.scorers:
            values = iter(_values(scorer, [*items, *flat]))
            for row in rows:
                row[scorer.name] = next(values)
            for row, mine in zip(rows, others, strict=True):
                if mine:
                    row[negatives_column(scorer.name)] = fmean(next(values) for _ in mine)
        return rows

    def forget(self) -> None:
        self._others.clear()
        for scorer in self.scorers:
            scorer.forget()

    def num_over_length(self, sentences: Sequence[str]) -> dict[str, int]:
        """Count the sentences that each scorer with a limit cannot read whole, by its name."""
        return {s.name: s.num_over_length(sentences) for s in self.scorers if isinstance(s, LengthLimited)}


def _values(scorer: Scorer, items: Sequence[tuple[Prompt, str]]) -> list[float]:
    found = scorer.score(items)
    if len(found) != len(items):
        raise CsrError(f"scorer {scorer.name} gave {len(found)} scores for {len(items)} sentences")
    return [_checked(scorer.name, item, scores) for item, scores in zip(items, found, strict=True)]


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
