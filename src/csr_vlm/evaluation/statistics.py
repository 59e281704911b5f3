"""Numbers with the doubt that belongs to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    if len(numerators) != len(denominators):
        raise ValueError("numerators and denominators must be sequences of one length")

    def quotient(sums: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            quotients: np.ndarray = sums[0] / np.where(sums[1] > 0, sums[1], np.nan)
        return quotients

    return bootstrap([numerators, denominators], quotient, seed)


def bootstrap(
    columns: Sequence[Sequence[float]], statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0
) -> Metric:
    """Compute a function of sums over prompts and its percentile bootstrap interval.

    Args:
        columns: What each prompt adds to each sum; all of one length n.
        statistic: Maps sums of shape (columns, draws) to values of shape (draws,); nan
            where it is not defined.
    """
    table = np.asarray(columns, dtype=float)
    if table.ndim != 2:
        raise ValueError("every column must be a sequence of one length")
    n = table.shape[1]
    value = float(statistic(table.sum(axis=1, keepdims=True))[0]) if n else float("nan")
    if np.isnan(value):
        return Metric(None, None, None, n)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)
    values = statistic(table @ draws.T)
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return Metric(value, float(low), float(high), n)
