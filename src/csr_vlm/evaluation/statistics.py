"""Compute metrics with confidence intervals, and paired tests between two policies.

Every metric is a ratio of sums over prompts. A prompt contributes a tally: what it adds to the
numerator and to the denominator. Prompts are the units of every interval and test, because mentions
within one prompt may depend on each other.

Nothing here draws random numbers except the permutation test, whose seed is fixed. The intervals
hold near 0 and 1, where most metrics of a good policy lie; resampling the prompts does not (of 30
prompts without an event it gives [0, 0]). The functions below the public ones take any number of
cases at once, so that the tests can simulate thousands.
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
_Estimate = tuple[_Array, _Array, _Array]
"""Value, lower and upper bound of every case; nan where undefined."""


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
    return _metric(*_ratios(table[None]), len(table))


def share_of_sums(columns: Sequence[Sequence[float]], statistic: Callable[[_Array], _Array]) -> Metric:
    """Compute a function of sums over prompts with values in 0..1, such as F1, and its 95 % interval.

    Args:
        columns: Each prompt's contribution to each sum; all of the same length n.
        statistic: Maps sums of shape (columns, ...) to values of shape (...), nan where it is undefined.
    """
    table = _table(columns)
    if not len(table):
        return Metric(None, None, None, 0)
    value, variance = _jackknife(table[None], statistic)
    trials = np.asarray([float(len(table))])
    return _metric(value, *_share_interval(value, variance, len(table), trials), len(table))


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
    n = len(before)
    sides = [np.asarray(side, dtype=float).reshape(1, -1, 2) for side in (before, after)]
    estimates = [_ratios(side) for side in sides]
    old, new = (_number(value) for value, _, _ in estimates)
    if old is None or new is None:
        return Difference(old, new, None, None, None, None, "none", n)
    table = np.concatenate(sides, axis=2)[0]
    if bool((table[:, [1, 3]] == 1).all() and np.isin(table[:, [0, 2]], (0, 1)).all()):
        gained = int((table[:, 0] < table[:, 2]).sum())
        lost = int((table[:, 0] > table[:, 2]).sum())
        return Difference(old, new, new - old, *tango(gained, lost, n), mcnemar(gained, lost), "McNemar, exact", n)
    low, high = (_number(bound) for bound in _mover(estimates, _correlation(sides, estimates)))
    p = float(_permutation_p(sides, seed)[0])
    return Difference(old, new, new - old, low, high, p, "paired permutation", n)


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
    from scipy.special import ndtri

    z = float(ndtri(1 - _TAIL))

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
    return float(share_below(np.asarray(negative, dtype=float), np.asarray(positive, dtype=float)).mean())


def auc_metric(positive: Sequence[float], negative: Sequence[float]) -> Metric:
    r"""Compute the AUC of n pairs and its 95 % interval; item i of both sides is one pair.

    With V_i = P(x_i > Y) + P(X > y_i), where equality counts one half, the AUC is A = mean(V_i) / 2 and

        se^2 = sum (V_i - 2 A)^2 / (n (n - 1))

    the variance of DeLong et al. (1988) with pairs as the clusters of Obuchowski (1997). The interval is

        expit(logit(A) -+ t(n - 1) se / (A (1 - A)))

    Where that has no width, as at A = 1, the bounds are the theta that solve (Newcombe 2006, method 5,
    from the variance of Hanley and McNeil 1982)

        (A - theta)^2 = z^2 theta (1 - theta) / n^2 (1 + (n - 1) ((1 - theta) / (2 - theta) + theta / (1 + theta)))

    Example:
        >>> found = auc_metric([2.0] * 30, [1.0] * 30)
        >>> found.value, round(found.low, 3), found.high
        (1.0, 0.933, 1.0)
    """
    from scipy.special import expit, logit, stdtrit

    if len(positive) != len(negative):
        raise ValueError("both sides must have the same length")
    n, high, low = len(positive), np.asarray(positive, dtype=float), np.asarray(negative, dtype=float)
    if not n:
        return Metric(None, None, None, 0)
    placements = share_below(low, high) + 1 - share_below(high, low)
    value = float(placements.mean()) / 2
    spread = float(((placements - 2 * value) ** 2).sum())
    if not (0 < value < 1 and spread > 1e-12):
        return Metric(value, *auc_score_interval(value, n, n), n)
    error = math.sqrt(spread / (n * (n - 1))) / (value * (1 - value))
    half = float(stdtrit(n - 1, 1 - _TAIL)) * error
    return Metric(value, float(expit(logit(value) - half)), float(expit(logit(value) + half)), n)


def auc_score_interval(value: float, num_positive: int, num_negative: int) -> tuple[float, float]:
    """Compute the ends of Newcombe's interval (2006, method 5) of an AUC; it never has width 0.

    With m positive and n negative items they solve, with the variance of Hanley and McNeil (1982),

        (A - theta)^2 = z^2 theta (1 - theta) / (m n) (1 + N ((1 - theta) / (2 - theta) + theta / (1 + theta)))

    where N = (m + n) / 2 - 1.
    """
    from scipy.optimize import brentq
    from scipy.special import ndtri

    z = float(ndtri(1 - _TAIL))
    more = (num_positive + num_negative) / 2 - 1

    def excess(theta: float) -> float:
        spread = 1 + more * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return abs(value - theta) - z * math.sqrt(theta * (1 - theta) * spread / (num_positive * num_negative))

    low = 0.0 if value == 0 else float(brentq(excess, 0.0, min(value, 1 - 1e-12)))
    high = 1.0 if value == 1 else float(brentq(excess, max(value, 1e-12), 1.0))
    return low, high


def share_below(values: _Array, points: _Array) -> _Array:
    """Return for each point the share of values below it, where equality counts one half."""
    ordered = np.sort(values)
    shares: _Array = (np.searchsorted(ordered, points, "left") + np.searchsorted(ordered, points, "right")) / (
        2 * len(ordered)
    )
    return shares


def _table(columns: Sequence[Sequence[float]]) -> _Array:
    """Return the columns as shape (prompts, columns)."""
    table = np.asarray(columns, dtype=float).T
    if table.ndim != 2:
        raise ValueError("all columns must have the same length")
    return table


def _quotient(sums: _Array) -> _Array:
    quotients: _Array = sums[0] / np.where(sums[1] > 0, sums[1], np.nan)
    return quotients


def _number(value: _Array) -> float | None:
    """Return the value of a single case; None for nan."""
    return None if math.isnan(value[0]) else float(value[0])


def _metric(value: _Array, low: _Array, high: _Array, n: int) -> Metric:
    return Metric(_number(value), _number(low), _number(high), n)


def _ratios(tables: _Array) -> _Estimate:
    """Compute the ratios of sums and their intervals from tallies of shape (cases, prompts, 2)."""
    top, n = tables[..., 0], tables.shape[1]
    value, variance = _jackknife(tables, _quotient)
    positive = (top >= 0).all(axis=1)
    share = positive & (top <= tables[..., 1]).all(axis=1)
    low, high = np.full_like(value, np.nan), np.full_like(value, np.nan)
    for kind, interval in ((share, _share_interval), (positive & ~share, _gamma_interval), (~positive, _t_interval)):
        at = kind & ~np.isnan(value)
        if at.any():
            low[at], high[at] = interval(value[at], variance[at], n, tables[at, :, 1].sum(axis=1))
    return value, low, high


def _jackknife(tables: _Array, statistic: Callable[[_Array], _Array]) -> tuple[_Array, _Array]:
    """Compute a statistic of sums over prompts and its variance, from a table of shape (cases, prompts, columns).

    The variance is (m - 1) / m sum (s_(-i) - mean)^2 over the m statistics s_(-i) without one prompt that
    are defined; 0 where m < 2.
    """
    columns = np.moveaxis(tables, -1, 0)
    sums = columns.sum(axis=-1)
    without = statistic(sums[..., None] - columns)
    defined = ~np.isnan(without)
    m = np.maximum(defined.sum(axis=-1), 1)
    mean = np.where(defined, without, 0.0).sum(axis=-1) / m
    squares = np.where(defined, without - mean[..., None], 0.0) ** 2
    return statistic(sums), (m - 1) / m * squares.sum(axis=-1)


def _share_interval(value: _Array, variance: _Array, n: int, trials: _Array) -> tuple[_Array, _Array]:
    """Compute the Clopper-Pearson interval of the effective number of trials; of n prompts at 0 and 1."""
    from scipy.special import betaincinv, ndtri, stdtrit

    shrink = (ndtri(_TAIL) / stdtrit(n - 1, _TAIL)) ** 2 if n > 1 else 1.0
    inside = (value > 0) & (value < 1) & (variance > 0)
    effective = value * (1 - value) / np.where(inside, variance, 1.0) * shrink
    size = np.where(inside, np.minimum(effective, trials), float(n))
    events = value * size
    low = np.where(value > 0, betaincinv(events, size - events + 1, _TAIL), 0.0)
    high = np.where(value < 1, betaincinv(events + 1, size - events, 1 - _TAIL), 1.0)
    return low, high


def _gamma_interval(value: _Array, variance: _Array, n: int, _: _Array) -> tuple[_Array, _Array]:
    """Compute the gamma interval of ratios that cannot be negative; of 0 events in n prompts where one is 0."""
    from scipy.special import gammaincinv

    some = value > 0
    # A ratio that is the same for every prompt is treated as if one prompt could have had none of it.
    scale = np.where(some, np.maximum(variance, (value / n) ** 2), 1.0) / np.where(some, value, 1.0)
    events = value / scale
    low = np.where(some, gammaincinv(events, _TAIL) * scale, 0.0)
    high = np.where(some, gammaincinv(events + 1, 1 - _TAIL) * scale, -math.log(_TAIL) / n)
    return low, high


def _t_interval(value: _Array, variance: _Array, n: int, _: _Array) -> tuple[_Array, _Array]:
    """Compute Student's interval; nan for a single prompt, which says nothing about the spread."""
    from scipy.special import stdtrit

    quantile = float(stdtrit(n - 1, 1 - _TAIL)) if n > 1 else math.nan
    # A value that is the same for every prompt is treated as if one prompt could have had none of it.
    half = quantile * np.sqrt(np.maximum(np.maximum(variance, (value / n) ** 2), 1e-24))
    return value - half, value + half


def _residuals(sides: Sequence[_Array], ratios: Sequence[_Array]) -> tuple[_Array, _Array]:
    """Return the linearized residuals (a_i - R b_i) / sum(b_i) of both policies, of shape (cases, prompts)."""
    first, second = (
        (side[..., 0] - ratio[:, None] * side[..., 1]) / side[..., 1].sum(axis=1)[:, None]
        for side, ratio in zip(sides, ratios, strict=True)
    )
    return first, second


def _correlation(sides: Sequence[_Array], estimates: Sequence[_Estimate]) -> _Array:
    """Compute the correlation of both policies' residuals over prompts; 0 where one has none."""
    first, second = _residuals(sides, [value for value, _, _ in estimates])
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    correlation: _Array = np.clip((first * second).sum(axis=1) / np.where(norms > 0, norms, 1.0), -1, 1)
    return correlation


def _mover(estimates: Sequence[_Estimate], correlation: _Array) -> tuple[_Array, _Array]:
    """Combine two intervals into that of the difference after - before (Zou and Donner 2008)."""
    (old, old_low, old_high), (new, new_low, new_high) = estimates

    def half(x: _Array, y: _Array) -> _Array:
        # Equal policies have correlation 1; an interval still needs a width.
        floor = np.maximum((np.minimum(x, y) / 10) ** 2, 1e-24)
        root: _Array = np.sqrt(np.maximum(x * x - 2 * correlation * x * y + y * y, floor))
        return root

    return new - old - half(new - new_low, old_high - old), new - old + half(new_high - new, old - old_low)


def _permutation_p(sides: Sequence[_Array], seed: int) -> _Array:
    r"""Compute two-sided p-values by flipping the signs of the prompts' linearized residuals at random.

    Under no difference both policies have the ratio R of all tallies together, and

        e_i = (a_i(after) - R b_i(after)) / sum b(after) - (a_i(before) - R b_i(before)) / sum b(before)

    is as likely as -e_i; the sum of all e_i is the difference D.

        p = (1 + number of flips with |D*| >= |D|) / (1 + number of flips)

    Args:
        sides: Tallies of both policies, each of shape (cases, prompts, 2).
        seed: Random seed of the flips, which are the same for every case.
    """
    common = _quotient(np.moveaxis(sides[0].sum(axis=1) + sides[1].sum(axis=1), -1, 0))
    first, second = _residuals(sides, [common, common])
    residuals = second - first
    generator, observed = np.random.default_rng(seed), np.abs(residuals.sum(axis=1))
    extreme, n = np.zeros(len(residuals)), residuals.shape[1]
    for size in _chunks(_PERMUTATIONS, n):
        signs = generator.integers(0, 2, (size, n)).astype(float) * 2 - 1
        extreme += (np.abs(residuals @ signs.T) >= observed[:, None] - 1e-12).sum(axis=1)
    p_values: _Array = (1 + extreme) / (1 + _PERMUTATIONS)
    return p_values


def _chunks(rows: int, columns: int) -> Iterator[int]:
    """Yield batch sizes that sum to ``rows``, each with at most ``_CELLS`` cells of ``columns`` columns."""
    size = max(_CELLS // max(columns, 1), 1)
    yield from (min(size, rows - start) for start in range(0, rows, size))
