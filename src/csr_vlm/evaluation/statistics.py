"""Numbers with the doubt that belongs to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_RESAMPLES = 2000


@dataclass(frozen=True)
class Metric:
    """A ratio of sums over prompts, with a 95 % bootstrap interval over prompts."""

    value: float | None
    """None where the denominator is 0."""
    low: float | None
    high: float | None
    n: int
    """Prompts it was computed over."""

    def dump(self) -> dict[str, Any]:
        return asdict(self)


def ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Metric:
    """Compute sum(numerators) / sum(denominators) and its percentile bootstrap interval.

    Prompts are resampled whole, so mentions within a prompt may depend on each other.

    Example:
        >>> ratio([1, 0, 1, 0], [1, 1, 1, 1]).value
        0.5
    """
    top, bottom = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    if top.shape != bottom.shape or top.ndim != 1:
        raise ValueError("numerators and denominators must be sequences of one length")
    if bottom.sum() == 0:
        return Metric(None, None, None, len(top))
    draws = np.random.default_rng(seed).multinomial(len(top), np.full(len(top), 1 / len(top)), size=_RESAMPLES)
    tops, bottoms = draws @ top, draws @ bottom
    ratios = tops[bottoms > 0] / bottoms[bottoms > 0]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Metric(float(top.sum() / bottom.sum()), float(low), float(high), len(top))
