"""Numbers with the doubt that belongs to them.

Every metric is a ratio of sums over prompts, so a prompt's share of it is a tally: what it
adds to the numerator and to the denominator. Prompts are resampled and exchanged whole:
mentions within one may depend on each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp, lgamma, log
from typing import Any

import numpy as np
import numpy.typing as npt

_RESAMPLES = 2000
_PERMUTATIONS = 10_000
_CELLS = 1 << 22
"""Draws held in memory at once."""

Tally = tuple[float, float]
"""What one prompt adds to a metric's numerator and to its denominator."""
_Array = npt.NDArray[np.float64]


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


@dataclass(frozen=True)
class Difference:
    """How a metric differs between two policies that answered the same prompts."""

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

    def quotient(sums: _Array) -> _Array:
        quotients: _Array = sums[0] / np.where(sums[1] > 0, sums[1], np.nan)
        return quotients

    return bootstrap([numerators, denominators], quotient, seed)


def bootstrap(columns: Sequence[Sequence[float]], statistic: Callable[[_Array], _Array], seed: int = 0) -> Metric:
    """Compute a function of sums over prompts and its percentile bootstrap interval.

    Args:
        columns: What each prompt adds to each sum; all of one length n.
        statistic: Maps sums of shape (columns, draws) to values of shape (draws,); nan
            where it is not defined.
    """
    table = np.asarray(columns, dtype=float).T
    if table.ndim != 2:
        raise ValueError("every column must be a sequence of one length")
    value = float(statistic(table.sum(axis=0)[:, None])[0]) if len(table) else float("nan")
    if np.isnan(value):
        return Metric(None, None, None, len(table))
    low, high = np.nanpercentile(statistic(_resampled_sums(table, seed).T), [2.5, 97.5])
    return Metric(value, float(low), float(high), len(table))


def pooled(rows: Sequence[Mapping[str, Tally]]) -> dict[str, Metric]:
    """Compute every metric from the prompts' tallies; a prompt may be without some of them."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: ratio([a for a, _ in mine], [b for _, b in mine]) for name, mine in columns.items()}


def paired_difference(before: Sequence[Tally], after: Sequence[Tally], seed: int = 0) -> Difference:
    r"""Compare a metric of two policies over the same prompts, item i being the same prompt in both.

    With a_i / b_i a prompt's tally, the difference is

        D = sum a_i(after) / sum b_i(after) - sum a_i(before) / sum b_i(before)

    and its interval the 2.5th and 97.5th percentile of D over resampled prompts. Where every
    tally is 0/1 or 1/1 the test is McNemar's, exact; otherwise the paired permutation test.

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
    r"""Two-sided exact p-value of McNemar's test.

    Of the prompts whose outcome changed, each direction is as likely as the other under no
    difference:

        p = min(1, 2 P(X <= min(gained, lost))),  X ~ Binomial(gained + lost, 1/2)

    Example:
        >>> round(mcnemar(1, 5), 6)  # 2 (1 + 6) / 64
        0.21875
    """
    total = gained + lost
    if total == 0:
        return 1.0
    halves = total * log(2)
    tail = sum(
        exp(lgamma(total + 1) - lgamma(k + 1) - lgamma(total - k + 1) - halves) for k in range(min(gained, lost) + 1)
    )
    return min(1.0, 2 * tail)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm 1979): the i-th smallest of m, from 0, times (m - i).

    Example:
        >>> holm([0.01, 0.5, 0.02])
        [0.03, 0.5, 0.04]
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda at: p_values[at])):
        largest = max(largest, min(1.0, p_values[place] * (len(p_values) - rank)))
        adjusted[place] = largest
    return adjusted


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """P(a positive > a negative) + P(equal) / 2, over all pairs of one of each.

    Example:
        >>> auc([2.0, 1.0], [1.0, 0.0])
        0.875
    """
    ordered = np.sort(np.asarray(negative))
    below = np.searchsorted(ordered, positive, side="left")
    not_above = np.searchsorted(ordered, positive, side="right")
    return float((below + not_above).mean() / 2 / len(ordered))


def _chunks(rows: int, columns: int) -> Iterator[int]:
    """Split ``rows`` so that no more than so many cells are drawn at once."""
    size = max(_CELLS // max(columns, 1), 1)
    yield from (min(size, rows - start) for start in range(0, rows, size))


def _resampled_sums(table: _Array, seed: int) -> _Array:
    """Sum the columns over prompts drawn with replacement: of shape (resamples, columns)."""
    generator, number = np.random.default_rng(seed), len(table)
    share = np.full(number, 1 / number)
    return np.concatenate(
        [generator.multinomial(number, share, size=size) @ table for size in _chunks(_RESAMPLES, number)]
    )


def _differences(sums: _Array) -> _Array:
    """Ratio of the last two columns less that of the first two, where both have a value."""
    sums = sums[(sums[:, 1] > 0) & (sums[:, 3] > 0)]
    found: _Array = sums[:, 2] / sums[:, 3] - sums[:, 0] / sums[:, 1]
    return found


def _permutation_p(table: _Array, seed: int) -> float:
    """Two-sided p-value when each prompt's two tallies are exchanged at random.

    p = (1 + number of exchanges with |D*| >= |D|) / (1 + number of exchanges)
    """
    generator = np.random.default_rng(seed)
    change = table[:, [2, 3, 0, 1]] - table
    sums = np.concatenate(
        [generator.integers(0, 2, (size, len(table))) @ change for size in _chunks(_PERMUTATIONS, len(table))]
    )
    observed = abs(_differences(table.sum(axis=0)[None])[0])
    extreme = int((np.abs(_differences(sums + table.sum(axis=0))) >= observed - 1e-12).sum())
    return (1 + extreme) / (1 + _PERMUTATIONS)
