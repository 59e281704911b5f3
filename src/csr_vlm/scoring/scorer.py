"""Define what a scorer is, and combine several scorers into one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Protocol, runtime_checkable

from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt, negatives_column

_TOLERANCE = 1e-3
"""Largest excess over -1..1 of a cosine in half precision."""


class Scorer(Protocol):
    """Define image-text relevance. A user's own class is constructed as ``MyScorer(config, device)``.

    ``config`` is its :class:`csr_vlm.config.schema.OneScorerConfig`, ``device`` the name of a torch
    device. A complete scorer::

        class RandomScorer:
            def __init__(self, config, device):
                self.name = config.name

            def score(self, items):
                return [{self.name: random.uniform(-1, 1)} for prompt, sentence in items]

            def forget(self):
                pass

    Scores of an item must not depend on the other items or their order, beyond rounding.
    """

    name: str
    """Name of its column in the ledger: ``config.name``."""

    def score(self, items: Sequence[tuple[Prompt, str]]) -> Sequence[Mapping[str, float]]:
        """Return ``{name: cosine}`` for each (prompt, sentence), in their order, each in -1..1.

        ``prompt.image`` is the path of the image. R_I (eq. 3) is 100 times the cosine, or 0
        where that is negative.
        """
        ...

    def forget(self) -> None:
        """Drop cached images; called between work items."""
        ...


@runtime_checkable
class LengthLimited(Scorer, Protocol):
    """Define a scorer whose text encoder has a length limit."""

    def num_over_length(self, sentences: Iterable[str]) -> int:
        """Count the sentences that exceed the limit."""
        ...


def with_gray_image(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return prompts whose images can be each other's negatives: with a gray one if all are about one image."""
    if len({prompt.image for prompt in prompts}) > 1:
        return list(prompts)
    return [*prompts, Prompt("gray", str(Path(__file__).parent / "assets" / "gray.png"), "")]


class ScorerGroup:
    """Combine several scorers: every sentence gets a column per scorer, and every value is checked."""

    def __init__(self, scorers: Sequence[Scorer]) -> None:
        self.scorers = scorers
        self.name = scorers[0].name
        """Name of the first scorer."""
        self._negatives: dict[str, list[Prompt]] = {}
        """Prompts with the negative images of each image path."""

    def set_negative_images(self, prompts: Sequence[Prompt], num_negatives: int) -> None:
        """Score every sentence also against ``num_negatives`` other images of these prompts from now on.

        An image's negatives are the next distinct images in the order given, so they depend on
        the work item and on nothing else. Their mean cosine goes to the column
        :func:`csr_vlm.core.records.negatives_column`.
        """
        by_image = list({prompt.image: prompt for prompt in prompts}.values())
        twice = by_image * 2
        number = min(num_negatives, len(by_image) - 1)
        self._negatives = {}
        if number > 0:
            self._negatives = {
                prompt.image: twice[index + 1 : index + 1 + number] for index, prompt in enumerate(by_image)
            }

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        """Compute all columns of each (prompt, sentence), in their order.

        Raises:
            CsrError: A scorer returns anything other than one number in -1..1 per item.
        """
        negatives = [[(prompt, sentence) for prompt in self._negatives.get(p.image, ())] for p, sentence in items]
        all_negatives = [item for item_negatives in negatives for item in item_negatives]
        rows: list[dict[str, float]] = [{} for _ in items]
        for scorer in self.scorers:
            values = iter(_values(scorer, [*items, *all_negatives]))
            for row in rows:
                row[scorer.name] = next(values)
            for row, item_negatives in zip(rows, negatives, strict=True):
                if item_negatives:
                    row[negatives_column(scorer.name)] = fmean(next(values) for _ in item_negatives)
        return rows

    def forget(self) -> None:
        """Drop the negative images and the scorers' cached images."""
        self._negatives.clear()
        for scorer in self.scorers:
            scorer.forget()

    def num_over_length(self, sentences: Sequence[str]) -> dict[str, int]:
        """Count the sentences that exceed each scorer's length limit, by name of the scorers that have one."""
        return {s.name: s.num_over_length(sentences) for s in self.scorers if isinstance(s, LengthLimited)}


def _values(scorer: Scorer, items: Sequence[tuple[Prompt, str]]) -> list[float]:
    """Score items with one scorer and check the values."""
    scores = scorer.score(items)
    if len(scores) != len(items):
        raise CsrError(
            f"scorer {scorer.name} returned {len(scores)} scores for {len(items)} sentences",
            "its score method must return one mapping per item",
        )
    return [_checked(scorer.name, item, columns) for item, columns in zip(items, scores, strict=True)]


def _checked(name: str, item: tuple[Prompt, str], columns: Mapping[str, float]) -> float:
    value = columns.get(name, math.nan)
    # Written so that not-a-number fails too.
    if not -1 - _TOLERANCE <= value <= 1 + _TOLERANCE:
        prompt, sentence = item
        raise CsrError(
            f"scorer {name} returned {value} for prompt {prompt.prompt_id}, sentence {sentence!r}; expected a cosine "
            "in -1..1",
            f"check {prompt.image} and the scorer's weights",
        )
    return float(value)
