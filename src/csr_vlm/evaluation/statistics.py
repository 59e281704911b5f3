"""Compute metrics with confidence intervals, and paired tests between two policies.

Every metric is a ratio of sums over prompts. A prompt contributes a tally: what it adds to the
numerator and to the denominator. Prompts are resampled and permuted as a whole, because mentions
within one prompt may depend on each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_RESAMPLES = 2000
_PERMUTATIONS = 10_000
_CELLS = 1 << 22
"""Upper limit on the random draws held in memory at once."""

Tally = tuple[float, float]
"""A prompt's contribution to a metric: (numerator, denominator)."""
_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """Hold a ratio of sums over prompts and its 95 % bootstrap interval over prompts."""

    value: float | None
    """None where the denominator is 0."""
    low: float | None
    high: float | None
    n: int
    """Number of prompts."""

    def dump(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """Hold the difference of a metric between two policies that answered the same prompts."""

    before: float | None
    after: float | None
    value: float | None
    """after - before; None where either has no value."""
    low: float | None
    high: float | None
    """95 % percentile bootstrap interval over prompts, both policies resampled together."""
    p: float | None
    """Two-sided p-value of no difference, by ``test``."""
    test: str
    n: int
    """Number of prompts."""

    def dump(self) -> dict[str, Any]:
        return asdict(self)


def ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Metric:
    """Compute sum(numerators) / sum(denominators) and its percentile bootstrap interval over prompts.

    Example:
        >>> ratio([1, 0, 1, 0], [1, 1, 1, 1]).value
        0.5
    """
    if len(numerators) != len(denominators):
        raise ValueError("numerators and denominators must have the same length")

    def quotient(sums: _Array) -> _Array:
        quotients: _Array = sums[0] / np.where(sums[1] > 0, sums[1], np.nan)
        return quotients

    return bootstrap([numerators, denominators], quotient, seed)


def bootstrap(columns: Sequence[Sequence[float]], statistic: Callable[[_Array], _Array], seed: int = 0) -> Metric:
    """Compute a function of sums over prompts and its 95 % percentile bootstrap interval.

    This function is used instead of ``scipy.stats.bootstrap`` because the latter draws its resamples
    from another random stream, which would change the last digits of every interval reported so far.

    Args:
        columns: Each prompt's contribution to each sum; all of the same length n.
        statistic: Maps sums of shape (columns, draws) to values of shape (draws,), nan
            where it is undefined.
    """
    table = np.asarray(columns, dtype=float).T
    if table.ndim != 2:
        raise ValueError("all columns must have the same length")
    value = float(statistic(table.sum(axis=0)[:, None])[0]) if len(table) else float("nan")
    if np.isnan(value):
        return Metric(None, None, None, len(table))
    low, high = np.nanpercentile(statistic(_resampled_sums(table, seed).T), [2.5, 97.5])
    return Metric(value, float(low), float(high), len(table))


def pooled(rows: Sequence[Mapping[str, Tally]]) -> dict[str, Metric]:
    """Compute every metric from the prompts' tallies; a prompt may lack some metrics."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: ratio([a for a, _ in column], [b for _, b in column]) for name, column in columns.items()}


def paired_difference(before: Sequence[Tally], after: Sequence[Tally], seed: int = 0) -> Difference:
    r"""Compare a metric of two policies on the same prompts; item i of both is the same prompt.

    With a_i / b_i a prompt's tally, the difference is

        D = sum a_i(after) / sum b_i(after) - sum a_i(before) / sum b_i(before)

    and its interval extends from the 2.5th to the 97.5th percentile of D over resampled prompts.
    The test is McNemar's exact test where every tally is 0/1 or 1/1, and otherwise the paired
    permutation test.

    Example:
        >>> paired_difference([(1, 2), (1, 2)], [(0, 2), (1, 2)]).value
        -0.25
    """
    if len(before) != len(after):
        raise ValueError("the two policies must have answered the same prompts")
    table = np.column_stack([np.asarray(side, dtype=float).reshape(-1, 2) for side in (before, after)])
    sums = table.sum(axis=0)
    old, new = (float(top / bottom) if bottom else None for top, bottom in (sums[:2], sums[2:]))
    if old is None or new is None:
        return Difference(old, new, None, None, None, None, "none", len(table))
    low, high = np.percentile(_differences(_resampled_sums(table, seed)), [2.5, 97.5])
    binary = bool((table[:, [1, 3]] == 1).all() and np.isin(table[:, [0, 2]], (0, 1)).all())
    if binary:
        gained = int((table[:, 0] < table[:, 2]).sum())
        lost = int((table[:, 0] > table[:, 2]).sum())
        p, test = mcnemar(gained, lost), "McNemar, exact"
    else:
        p, test = _permutation_p(table, seed), "paired permutation"
    return Difference(old, new, new - old, float(low), float(high), p, test, len(table))


def mcnemar(gained: int, lost: int) -> float:
    r"""Compute the two-sided p-value of McNemar's exact test.

    Under no difference, a prompt whose outcome changed did so in either direction with equal
    probability:

        p = min(1, 2 P(X <= min(gained, lost))),  X ~ Binomial(gained + lost, 1/2)

    Example:
        >>> mcnemar(1, 5)  # 2 (1 + 6) / 64
        0.21875
    """
    from scipy.stats import binomtest

    total = gained + lost
    return float(binomtest(gained, total).pvalue) if total else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for multiple testing (Holm 1979).

    The i-th smallest of m p-values, counted from 0, is multiplied by m - i and made at least as
    large as the ones before it. scipy has no Holm adjustment (``false_discovery_control`` controls
    another error rate), so it is implemented here.

    Example:
        >>> holm([0.01, 0.5, 0.02])
        [0.03, 0.5, 0.04]
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Compute the area under the ROC curve: P(positive > negative) + P(positive = negative) / 2.

    Example:
        >>> auc([2.0, 1.0], [1.0, 0.0])
        0.875
    """
    ordered = np.sort(np.asarray(negative))
    below = np.searchsorted(ordered, positive, side="left")
    not_above = np.searchsorted(ordered, positive, side="right")
    return float((below + not_above).mean() / 2 / len(ordered))


def _chunks(rows: int, columns: int) -> Iterator[int]:
    """Yield batch sizes that sum to ``rows``, each with at most ``_CELLS`` cells of ``columns`` columns."""
    size = max(_CELLS // max(columns, 1), 1)
    yield from (min(size, rows - start) for start in range(0, rows, size))


def _resampled_sums(table: _Array, seed: int) -> _Array:
    """Sum the columns over prompts drawn with replacement; return shape (resamples, columns)."""
    generator, number = np.random.default_rng(seed), len(table)
    share = np.full(number, 1 / number)
    return np.concatenate(
        [generator.multinomial(number, share, size=size) @ table for size in _chunks(_RESAMPLES, number)]
    )


def _differences(sums: _Array) -> _Array:
    """Compute column 2 / column 3 - column 0 / column 1 in the rows where both ratios are defined."""
    sums = sums[(sums[:, 1] > 0) & (sums[:, 3] > 0)]
    values: _Array = sums[:, 2] / sums[:, 3] - sums[:, 0] / sums[:, 1]
    return values


def _permutation_p(table: _Array, seed: int) -> float:
    """Compute a two-sided p-value by swapping the two tallies of each prompt at random.

    p = (1 + number of permutations with |D*| >= |D|) / (1 + number of permutations)
    """
    generator = np.random.default_rng(seed)
    change = table[:, [2, 3, 0, 1]] - table
    sums = np.concatenate(
        [generator.integers(0, 2, (size, len(table))) @ change for size in _chunks(_PERMUTATIONS, len(table))]
    )
    observed = abs(_differences(table.sum(axis=0)[None])[0])
    extreme = int((np.abs(_differences(sums + table.sum(axis=0))) >= observed - 1e-12).sum())
    return (1 + extreme) / (1 + _PERMUTATIONS)
