"""Compute metrics with confidence intervals, and paired tests between two policies.

Every metric is a ratio of sums over prompts. A prompt contributes a tally: what it adds to the
numerator and to the denominator. Prompts are the units of every interval and test, because mentions
within one prompt may depend on each other.

Nothing here draws random numbers except the permutation test, whose seed is fixed. The intervals
hold near 0 and 1, where most metrics of a good policy lie: a percentile bootstrap does not (of 30
prompts without an event it gives [0, 0]).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_PERMUTATIONS = 10_000
_CELLS = 1 << 22
"""Upper limit on the random draws held in memory at once."""
_TAIL = 0.025
"""Probability in each tail of a 95 % interval."""

Tally = tuple[float, float]
"""A prompt's contribution to a metric: (numerator, denominator)."""
_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """Hold a function of sums over prompts and its 95 % confidence interval."""

    value: float | None
    """None where the denominator is 0."""
    low: float | None
    high: float | None
    """None where the value is, and where one prompt says nothing about the spread."""
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
    """95 % confidence interval of the paired difference."""
    p: float | None
    """Two-sided p-value of no difference, by ``test``."""
    test: str
    n: int
    """Number of prompts."""

    @property
    def became_undefined(self) -> bool:
        """Return whether the metric had a value before and has none after."""
        return self.before is not None and self.after is None

    def dump(self) -> dict[str, Any]:
        return asdict(self)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Metric:
    r"""Compute R = sum(a_i) / sum(b_i) and its 95 % interval over prompts.

    With v the jackknife variance of R over the n prompts:

    - a share (every 0 <= a_i <= b_i): the Clopper-Pearson interval of n* = R (1 - R) / v trials,
      at most sum(b_i), as Korn and Graubard (1998) have it for shares in clusters; of n trials if R is 0 or 1;
    - another ratio that cannot be negative: the gamma interval of R^2 / v events (Fay and Feuer 1997);
    - any other: Student's t with n - 1 degrees of freedom.

    An interval never has width 0.

    Example:
        >>> found = ratio([0] * 30, [1] * 30)
        >>> found.value, found.low, round(found.high, 3)
        (0.0, 0.0, 0.116)
    """
    if len(numerators) != len(denominators):
        raise ValueError("numerators and denominators must have the same length")
    table = _table([numerators, denominators])
    top, bottom = table.T if len(table) else (np.empty(0), np.empty(0))
    kind = "share" if ((top >= 0) & (top <= bottom)).all() else "positive" if (top >= 0).all() else "signed"
    return _metric(table, _quotient, kind, float(bottom.sum()))


def share_of_sums(columns: Sequence[Sequence[float]], statistic: Callable[[_Array], _Array]) -> Metric:
    """Compute a function of sums over prompts with values in 0..1, such as F1, and its 95 % interval.

    Args:
        columns: Each prompt's contribution to each sum; all of the same length n.
        statistic: Maps sums of shape (columns, cases) to values of shape (cases,), nan where it is undefined.
    """
    table = _table(columns)
    return _metric(table, statistic, "share", float(len(table)) if len(table) else 0.0)


def pooled(rows: Sequence[Mapping[str, Tally]]) -> dict[str, Metric]:
    """Compute every metric from the prompts' tallies; a prompt may lack some metrics."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: ratio([a for a, _ in column], [b for _, b in column]) for name, column in columns.items()}


def paired_difference(before: Sequence[Tally], after: Sequence[Tally], seed: int = 0) -> Difference:
    r"""Compare a metric of two policies on the same prompts; item i of both is the same prompt.

    With a_i / b_i a prompt's tally, the difference is

        D = sum a_i(after) / sum b_i(after) - sum a_i(before) / sum b_i(before)

    Where every tally is 0/1 or 1/1, the interval is Tango's score interval (1998) and the test
    McNemar's exact test. Otherwise the interval follows from those of both ratios and the
    correlation of their residuals (MOVER, Zou and Donner 2008), and the test permutes the signs of
    the linearized residuals.

    Example:
        >>> paired_difference([(1, 2), (1, 2)], [(0, 2), (1, 2)]).value
        -0.25
    """
    if len(before) != len(after):
        raise ValueError("the two policies must have answered the same prompts")
    sides = [np.asarray(side, dtype=float).reshape(-1, 2) for side in (before, after)]
    metrics = [ratio(side[:, 0].tolist(), side[:, 1].tolist()) for side in sides]
    old, new = (metric.value for metric in metrics)
    if old is None or new is None:
        return Difference(old, new, None, None, None, None, "none", len(before))
    table = np.column_stack(sides)
    if bool((table[:, [1, 3]] == 1).all() and np.isin(table[:, [0, 2]], (0, 1)).all()):
        gained = int((table[:, 0] < table[:, 2]).sum())
        lost = int((table[:, 0] > table[:, 2]).sum())
        low, high = tango(gained, lost, len(table))
        return Difference(old, new, new - old, low, high, mcnemar(gained, lost), "McNemar, exact", len(table))
    bounds = _mover(metrics[0], metrics[1], _correlation(sides, old, new))
    return Difference(old, new, new - old, *bounds, _permutation_p(sides, seed), "paired permutation", len(table))


def over_runs(values: Sequence[float], step: float = 0.0) -> Metric:
    """Compute the mean over runs with different seeds and its 95 % Student t interval.

    With one run there is no interval: a single seed says nothing about the spread over seeds.

    Args:
        values: One value per run.
        step: Smallest change of a value, such as 1 / number of scenes. The variance is at least that of
            rounding to it, step^2 / 12, so that runs which happen to agree do not give an interval of width 0.

    Example:
        >>> found = over_runs([1.0, 2.0, 3.0])  # 2 +- 4.303 / sqrt(3)
        >>> found.value, round(found.low, 3), round(found.high, 3)
        (2.0, -0.484, 4.484)
    """
    from scipy.stats import t

    n = len(values)
    if not n:
        return Metric(None, None, None, 0)
    value = float(np.mean(values))
    variance = max(float(np.var(values, ddof=1)), step**2 / 12) if n > 1 else 0.0
    if variance == 0.0:
        return Metric(value, None, None, n)
    half = float(t.ppf(1 - _TAIL, n - 1)) * math.sqrt(variance / n)
    return Metric(value, value - half, value + half, n)


def established(over_prompts: Metric | Difference, runs: Metric) -> bool:
    """Return whether a difference's intervals over prompts and over runs both exclude 0, on the same side."""
    bounds = [over_prompts.low, over_prompts.high, runs.low, runs.high]
    known = [bound for bound in bounds if bound is not None]
    return len(known) == len(bounds) and (min(known) > 0 or max(known) < 0)


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


def tango(gained: int, lost: int, n: int) -> tuple[float, float]:
    r"""Compute Tango's 95 % score interval (1998) of the difference of two paired shares.

    The interval holds the differences d whose score |T(d)| <= z:

        T(d) = (gained - lost - n d) / sqrt(n (2 q + d (1 - d)))
        q = (sqrt(B^2 - 4 A C) - B) / (2 A),  A = 2 n,
        B = -gained - lost + (2 n - gained + lost) d,  C = -lost d (1 - d)

    Example:
        >>> [round(bound, 4) for bound in tango(0, 0, 30)]
        [-0.1135, 0.1135]
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    z = float(norm.ppf(1 - _TAIL))

    def score(d: float) -> float:
        b = -gained - lost + (2 * n - gained + lost) * d
        q = (math.sqrt(max(b * b + 8 * n * lost * d * (1 - d), 0.0)) - b) / (4 * n)
        variance = n * (2 * q + d * (1 - d))
        distance = gained - lost - n * d
        if abs(distance) < 1e-12:
            return 0.0
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)

    estimate, edge = (gained - lost) / n, 1 - 1e-9
    low = -1.0 if score(-edge) <= z else float(brentq(lambda d: min(score(d), 2 * z) - z, -edge, estimate))
    high = 1.0 if score(edge) >= -z else float(brentq(lambda d: max(score(d), -2 * z) + z, estimate, edge))
    return low, high


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


def _table(columns: Sequence[Sequence[float]]) -> _Array:
    """Return the columns as shape (prompts, columns)."""
    table = np.asarray(columns, dtype=float).T
    if table.ndim != 2:
        raise ValueError("all columns must have the same length")
    return table


def _quotient(sums: _Array) -> _Array:
    quotients: _Array = sums[0] / np.where(sums[1] > 0, sums[1], np.nan)
    return quotients


def _metric(table: _Array, statistic: Callable[[_Array], _Array], kind: str, trials: float) -> Metric:
    """Compute a statistic of sums and its interval from its jackknife variance over the rows of the table."""
    n = len(table)
    value = float(statistic(table.sum(axis=0)[:, None])[0]) if n else math.nan
    if math.isnan(value):
        return Metric(None, None, None, n)
    variance = _jackknife_variance(table, statistic)
    if kind == "share":
        low, high = _share_interval(value, variance, n, trials)
    elif kind == "positive":
        low, high = _gamma_interval(value, variance, n)
    elif n > 1:
        low, high = _t_interval(value, variance, n)
    else:
        return Metric(value, None, None, n)
    return Metric(value, low, high, n)


def _jackknife_variance(table: _Array, statistic: Callable[[_Array], _Array]) -> float:
    """Compute (n - 1) / n sum (s_(-i) - mean)^2 over the statistics s_(-i) without one prompt."""
    values = statistic((table.sum(axis=0) - table).T)
    values = values[~np.isnan(values)]
    n = len(values)
    return float((n - 1) / n * ((values - values.mean()) ** 2).sum()) if n > 1 else 0.0


def _share_interval(value: float, variance: float, n: int, trials: float) -> tuple[float, float]:
    """Compute the Clopper-Pearson interval of the effective number of trials; of n prompts at 0 and 1."""
    from scipy.stats import beta, norm, t

    if value in (0.0, 1.0) or variance <= 0.0:
        size = float(n)
    else:
        shrink = (norm.ppf(_TAIL) / t.ppf(_TAIL, n - 1)) ** 2 if n > 1 else 1.0
        size = min(value * (1 - value) / variance * shrink, trials)
    events = value * size
    low = float(beta.ppf(_TAIL, events, size - events + 1)) if value > 0 else 0.0
    high = float(beta.ppf(1 - _TAIL, events + 1, size - events)) if value < 1 else 1.0
    return low, high


def _gamma_interval(value: float, variance: float, n: int) -> tuple[float, float]:
    """Compute the gamma interval of a ratio that cannot be negative; of 0 events in n prompts if it is 0."""
    from scipy.stats import gamma

    if value == 0.0:
        return 0.0, -math.log(_TAIL) / n
    # A ratio that is the same for every prompt is treated as if one prompt could have had none of it.
    scale = max(variance, (value / n) ** 2) / value
    events = value / scale
    return float(gamma.ppf(_TAIL, events)) * scale, float(gamma.ppf(1 - _TAIL, events + 1)) * scale


def _t_interval(value: float, variance: float, n: int) -> tuple[float, float]:
    from scipy.stats import t

    # A value that is the same for every prompt is treated as if one prompt could have had none of it.
    deviation = math.sqrt(max(variance, (value / n) ** 2, 1e-24))
    half = float(t.ppf(1 - _TAIL, n - 1)) * deviation
    return value - half, value + half


def _residuals(sides: Sequence[_Array], old: float, new: float) -> tuple[_Array, _Array]:
    """Return the linearized residuals (a_i - R b_i) / sum(b_i) of both policies."""
    first, second = (
        (side[:, 0] - r * side[:, 1]) / side[:, 1].sum() for side, r in zip(sides, (old, new), strict=True)
    )
    return first, second


def _correlation(sides: Sequence[_Array], old: float, new: float) -> float:
    """Compute the correlation of both policies' residuals over prompts; 0 where one has none."""
    first, second = _residuals(sides, old, new)
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(np.clip(first @ second / norms, -1, 1)) if norms else 0.0


def _mover(before: Metric, after: Metric, correlation: float) -> tuple[float | None, float | None]:
    """Combine two intervals into that of the difference after - before (Zou and Donner 2008)."""
    if before.value is None or after.value is None or None in (before.low, before.high, after.low, after.high):
        return None, None
    assert before.low is not None and before.high is not None and after.low is not None and after.high is not None  # noqa: PT018
    value = after.value - before.value

    def half(x: float, y: float) -> float:
        # Equal policies have correlation 1; an interval still needs a width.
        return math.sqrt(max(x * x - 2 * correlation * x * y + y * y, (min(x, y) / 10) ** 2, 1e-24))

    return (
        value - half(after.value - after.low, before.high - before.value),
        value + half(after.high - after.value, before.value - before.low),
    )


def _permutation_p(sides: Sequence[_Array], seed: int) -> float:
    r"""Compute a two-sided p-value by flipping the signs of the prompts' linearized residuals at random.

    Under no difference both policies have the ratio R of all tallies together, and

        e_i = (a_i(after) - R b_i(after)) / sum b(after) - (a_i(before) - R b_i(before)) / sum b(before)

    is as likely as -e_i; the sum of all e_i is the difference D.

        p = (1 + number of flips with |D*| >= |D|) / (1 + number of flips)
    """
    total = sides[0].sum(axis=0) + sides[1].sum(axis=0)
    common = total[0] / total[1]
    first, second = _residuals(sides, common, common)
    residuals = second - first
    generator, observed, extreme = np.random.default_rng(seed), abs(residuals.sum()), 0
    for size in _chunks(_PERMUTATIONS, len(residuals)):
        signs = generator.integers(0, 2, (size, len(residuals))) * 2 - 1
        extreme += int((np.abs(signs @ residuals) >= observed - 1e-12).sum())
    return (1 + extreme) / (1 + _PERMUTATIONS)


def _chunks(rows: int, columns: int) -> Iterator[int]:
    """Yield batch sizes that sum to ``rows``, each with at most ``_CELLS`` cells of ``columns`` columns."""
    size = max(_CELLS // max(columns, 1), 1)
    yield from (min(size, rows - start) for start in range(0, rows, size))
