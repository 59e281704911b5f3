"""Define what a scorer is, and combine several scorers into one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Protocol, runtime_checkable

from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt, nearest_column, negatives_column, spread_column

_NUM_NEAREST = 8
"""Most similar images that a claim is compared with, at most half of all others."""
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


@runtime_checkable
class ComparesImages(Scorer, Protocol):
    """Define a scorer that can also compare images with each other."""

    def similarities(self, prompt: Prompt, others: Sequence[Prompt]) -> Sequence[float]:
        """Return how similar the images of other prompts are to that of a prompt; larger is more similar."""
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
        self._others: list[Prompt] = []
        """Prompts with all distinct images."""
        self._nearest: dict[str, list[Prompt]] = {}
        """Prompts with the most similar images of each image path, as far as they were needed."""

    def set_negative_images(
        self, prompts: Sequence[Prompt], num_negatives: int, similar: Sequence[Prompt] = ()
    ) -> None:
        """Score every sentence also against ``num_negatives`` other images of these prompts from now on.

        An image's negatives are the next distinct images in the order given, so they depend on
        the work item and on nothing else. Their mean cosine goes to the column
        :func:`csr_vlm.core.records.negatives_column`.

        Args:
            prompts: Prompts with the images.
            num_negatives: Number of negative images of each.
            similar: Further prompts, among whose images those most similar to an image are looked for as well.
        """
        by_image = list({prompt.image: prompt for prompt in prompts}.values())
        self._others, self._nearest = [*by_image, *similar], {}
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
        return [_means(row) for row in self._compare(items, [self._negatives.get(p.image, []) for p, _ in items])]

    def score_claims(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        """Compute the columns of each (prompt, caption of a claim), in their order.

        Beside those of :meth:`score`, these are the spread over the negative images (the standard
        deviation below their median, since some of them may show the claim as well), and
        the mean over the most similar images, by the first scorer that can compare images.

        Raises:
            CsrError: A scorer returns anything other than one number in -1..1 per item.
        """
        rows = self._compare(items, [self._negatives.get(p.image, []) for p, _ in items])
        nearest = self._compare(items, [self._nearest_of(p) for p, _ in items], own=False)
        return [
            _means(row)
            | {spread_column(name): _spread(others) for name, (_, others) in row.items() if others}
            | {nearest_column(name): fmean(similar) for name, (_, similar) in near.items() if similar}
            for row, near in zip(rows, nearest, strict=True)
        ]

    def _compare(
        self, items: Sequence[tuple[Prompt, str]], others: Sequence[Sequence[Prompt]], own: bool = True
    ) -> list[dict[str, tuple[float, list[float]]]]:
        """Return the cosines of each text with its own image (0 unless wanted) and with others, by scorer."""
        against = [(prompt, text) for (_, text), prompts in zip(items, others, strict=True) for prompt in prompts]
        rows: list[dict[str, tuple[float, list[float]]]] = [{} for _ in items]
        for scorer in self.scorers:
            values = iter(_values(scorer, [*(items if own else ()), *against]))
            with_own = [next(values) if own else 0.0 for _ in items]
            for row, value, prompts in zip(rows, with_own, others, strict=True):
                row[scorer.name] = value, [next(values) for _ in prompts]
        return rows

    def _nearest_of(self, prompt: Prompt) -> list[Prompt]:
        """Return the other prompts whose images are most similar; none if no scorer can compare images."""
        comparing = next((scorer for scorer in self.scorers if isinstance(scorer, ComparesImages)), None)
        if comparing is None:
            return []
        if prompt.image not in self._nearest:
            others = [other for other in self._others if other.image != prompt.image]
            similar = comparing.similarities(prompt, others) if others else []
            ranked = sorted(range(len(others)), key=lambda index: -similar[index])
            self._nearest[prompt.image] = [others[index] for index in ranked[: min(_NUM_NEAREST, len(others) // 2)]]
        return self._nearest[prompt.image]

    def forget(self) -> None:
        """Drop the negative images and the scorers' cached images."""
        self._negatives.clear()
        self._others, self._nearest = [], {}
        for scorer in self.scorers:
            scorer.forget()

    def num_over_length(self, sentences: Sequence[str]) -> dict[str, int]:
        """Count the sentences that exceed each scorer's length limit, by name of the scorers that have one."""
        return {s.name: s.num_over_length(sentences) for s in self.scorers if isinstance(s, LengthLimited)}


def _spread(values: Sequence[float]) -> float:
    """Return the standard deviation below the median, which the images that do show a claim do not widen."""
    middle = median(values)
    return math.sqrt(fmean((value - middle) ** 2 for value in values if value <= middle))


def _means(row: Mapping[str, tuple[float, list[float]]]) -> dict[str, float]:
    """Return each scorer's cosine, and its mean over other images if there are any."""
    columns: dict[str, float] = {}
    for name, (own, others) in row.items():
        columns[name] = own
        if others:
            columns[negatives_column(name)] = fmean(others)
    return columns


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
