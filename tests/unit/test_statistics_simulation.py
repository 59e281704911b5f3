"""Simulate the coverage of the intervals and the type I error of the tests, near 0 above all.

The bounds are 0.93 for coverage (nominal 0.95) and 0.06 for rejections (nominal 0.05). Every cell
draws so often that a true 0.95 or 0.05 lies at least 3.5 standard errors from its bound; 300 and
1,000 draws were too few (docs/log.md). Statistics are computed for all draws of a cell at once by
the functions that the public ones call with one case; each cell checks that on its first draws.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import pytest

from csr_vlm.evaluation import statistics
from csr_vlm.evaluation.statistics import auc_metric, mcnemar, paired_difference, ratio, tango

_COVERAGE, _LEVEL = 0.93, 0.06
_DRAWS, _NULL_DRAWS = 2_000, 6_000
"""Standard errors: 0.0049 of a coverage of 0.95, 0.0028 of a level of 0.05."""
_BATCH = 250
"""Cases computed at once; more do not fit in the cache."""
_SHARES = [0.003, 0.01, 0.03, 0.1, 0.2]
_Array = npt.NDArray[np.float64]


def _draw(rng: np.random.Generator, kind: str, cases: int, n: int, p: float) -> _Array:
    """Draw tallies of shape (cases, n, 2); the mentions of a clustered prompt depend on each other."""
    bottom = np.ones((cases, n), int) if kind in {"share", "count"} else rng.integers(1, 6, (cases, n))
    if kind == "count":
        return np.stack([rng.poisson(p, (cases, n)), bottom], axis=-1).astype(float)
    probability = rng.beta(4 * p, 4 * (1 - p), (cases, n)) if kind == "clustered" else p
    return np.stack([rng.binomial(bottom, probability), bottom], axis=-1).astype(float)


@pytest.mark.parametrize("n", [30, 500])
@pytest.mark.parametrize("p", _SHARES)
@pytest.mark.parametrize("kind", ["share", "ratio", "clustered", "count"])
def test_intervals_hold_the_true_value(kind, n, p):
    rng, covered = np.random.default_rng(0), 0
    for start in range(0, _DRAWS, _BATCH):
        tables = _draw(rng, kind, _BATCH, n, p)
        value, low, high = statistics._ratios(tables)
        assert (low < high).all(), "never a zero-width interval"
        covered += int(((low <= p) & (p <= high)).sum())
        for case in range(5 if start == 0 else 0):
            found = ratio(*tables[case].T.tolist())
            assert (found.value, found.low, found.high) == pytest.approx((value[case], low[case], high[case]))
    assert covered / _DRAWS >= _COVERAGE


@pytest.mark.parametrize(("n", "p"), [(30, 0.01), (500, 0.003)])
def test_an_interval_that_does_not_hold_near_zero_misses_the_bound(n, p):
    """Resample the prompts: of binary outcomes with share s, a resample has Binomial(n, s) events."""
    rng = np.random.default_rng(4)
    shares = rng.binomial(n, p, 2_000) / n
    low, high = np.percentile(rng.binomial(n, shares, (1_000, 2_000)) / n, [2.5, 97.5], axis=0)
    assert ((low <= p) & (p <= high)).mean() < 0.9


@cache
def _binary(gained: int, lost: int, n: int) -> tuple[float, float, float]:
    """Return the interval and p-value of a table of binary outcomes: they depend on nothing else."""
    return *tango(gained, lost, n), mcnemar(gained, lost)


_DIFFERENCES = [*((p, p) for p in _SHARES), (0.003, 0.03), (0.1, 0.03), (0.2, 0.05)]


@pytest.mark.parametrize("n", [30, 500])
@pytest.mark.parametrize(("p", "q"), _DIFFERENCES)
def test_binary_differences_hold_the_true_value_and_the_test_keeps_its_level(n, p, q):
    """Half of the prompts are as hard for both policies; the rest are drawn independently."""
    both = 0.5 * min(p, q) + 0.5 * p * q
    draws = _NULL_DRAWS if p == q else _DRAWS
    cells = np.random.default_rng(1).multinomial(n, [q - both, p - both, both, 1 - p - q + both], draws)
    found = np.array([_binary(int(gained), int(lost), n) for gained, lost, _, _ in cells])
    assert (found[:, 0] < found[:, 1]).all(), "never a zero-width interval"
    assert ((found[:, 0] <= q - p) & (q - p <= found[:, 1])).mean() >= _COVERAGE
    if p == q:
        assert (found[:, 2] <= 0.05).mean() <= _LEVEL
    gained, lost, same, none = cells[0]
    old = [(0, 1)] * gained + [(1, 1)] * (lost + same) + [(0, 1)] * none
    new = [(1, 1)] * gained + [(0, 1)] * lost + [(1, 1)] * same + [(0, 1)] * none
    whole = paired_difference(old, new)
    assert (whole.low, whole.high, whole.p) == pytest.approx(found[0])


def _draw_pair(rng: np.random.Generator, cases: int, n: int, p: float, q: float) -> list[_Array]:
    """Draw tallies of two policies: prompts differ in difficulty, and the second policy mentions fewer objects."""
    difficulty = rng.beta(0.8, 3.2, (cases, n)) / 0.2
    many = rng.integers(1, 7, (cases, n))
    few = np.maximum(many - rng.integers(0, 3, (cases, n)), 0)
    return [
        np.stack([rng.binomial(bottom, np.minimum(share * difficulty, 1)), bottom], axis=-1).astype(float)
        for bottom, share in ((many, p), (few, q))
    ]


@pytest.mark.parametrize("n", [30, 500])
@pytest.mark.parametrize(("p", "q"), _DIFFERENCES)
def test_differences_of_ratios_hold_the_true_value_and_the_test_keeps_its_level(monkeypatch, n, p, q):
    monkeypatch.setattr(statistics, "_PERMUTATIONS", 399)
    rng, covered, rejected = np.random.default_rng(2), 0, 0
    draws = _NULL_DRAWS if p == q else _DRAWS
    for start in range(0, draws, _BATCH):
        sides = _draw_pair(rng, _BATCH, n, p, q)
        p_values = statistics._permutation_p(sides, 0) if p == q or start == 0 else np.ones(_BATCH)
        rejected += int((p_values <= 0.05).sum())
        if start >= _DRAWS:
            continue
        estimates = [statistics._ratios(side) for side in sides]
        low, high = statistics._mover(estimates, statistics._correlation(sides, estimates))
        assert (low < high).all(), "never a zero-width interval"
        covered += int(((low <= q - p) & (q - p <= high)).sum())
        for case in range(3 if start == 0 else 0):
            found = paired_difference(*(side[case].tolist() for side in sides))
            assert (found.low, found.high, found.p) == pytest.approx((low[case], high[case], p_values[case]))
    assert covered / _DRAWS >= _COVERAGE
    if p == q:
        assert rejected / draws <= _LEVEL


@pytest.mark.parametrize("n", [30, 200])
@pytest.mark.parametrize(("area", "distance"), [(0.7, 0.741614), (0.9, 1.812388)])
@pytest.mark.parametrize("correlation", [0.0, 0.7])
def test_intervals_of_the_auc_hold_the_true_value(correlation, area, distance, n):
    """Scores are normal with variance 1, so that AUC = Phi(distance / sqrt(2)); both of a pair correlate."""
    rng, covered = np.random.default_rng(3), 0
    for _ in range(_DRAWS):
        shared, *own = rng.normal(size=(3, n))
        high, low = (np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * noise for noise in own)
        found = auc_metric(high + distance, low)
        assert found.low < found.high
        covered += found.low <= area <= found.high
    assert covered / _DRAWS >= _COVERAGE
