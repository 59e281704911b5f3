"""Simulate the coverage of the intervals and the type I error of the tests, near 0 above all."""

from __future__ import annotations

import numpy as np
import pytest

from csr_vlm.evaluation import statistics
from csr_vlm.evaluation.statistics import paired_difference, ratio

_RUNS = 800
_DIFFERENCES = 1000
"""Enough that 0.93 is two and a half standard errors below a coverage of 0.95.

The level takes three times as many, since its bound is nearer.
"""


def _draw(rng: np.random.Generator, kind: str, n: int, p: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw the prompts' numerators and denominators; the mentions of a clustered prompt depend on each other."""
    bottom = np.ones(n, int) if kind == "share" else rng.integers(1, 6, n)
    return rng.binomial(bottom, rng.beta(4 * p, 4 * (1 - p), n) if kind == "clustered" else p), bottom


@pytest.mark.parametrize("n", [30, 500])
@pytest.mark.parametrize("p", [0.003, 0.03, 0.2])
@pytest.mark.parametrize("kind", ["share", "ratio", "clustered"])
def test_intervals_hold_the_true_value(kind, n, p):
    rng = np.random.default_rng(0)
    found = [ratio(*_draw(rng, kind, n, p)) for _ in range(_RUNS)]
    assert all(metric.low < metric.high for metric in found), "never a zero-width interval"
    assert np.mean([metric.low <= p <= metric.high for metric in found]) >= 0.93


@pytest.mark.parametrize("n", [30, 500])
@pytest.mark.parametrize(("p", "q"), [(0.03, 0.03), (0.2, 0.2), (0.2, 0.05)])
@pytest.mark.parametrize("binary", [True, False])
def test_differences_hold_the_true_value_and_tests_keep_their_level(monkeypatch, binary, n, p, q):
    """Let the second policy mention fewer objects, so that the denominators move; the difficulty is shared."""
    monkeypatch.setattr(statistics, "_PERMUTATIONS", 200 if p == q else 1)
    rng, covered, rejected = np.random.default_rng(1), [], []
    for _ in range(_DIFFERENCES * (3 if p == q else 1)):
        if binary:
            first = rng.random(n)
            second = np.where(rng.random(n) < 0.5, first, rng.random(n))
            old, new = np.c_[first < p, np.ones(n)], np.c_[second < q, np.ones(n)]
        else:
            share = rng.beta(0.8, 3.2, n) / 0.2
            many = rng.integers(1, 7, n)
            few = np.maximum(many - rng.integers(0, 3, n), 0)
            old = np.c_[rng.binomial(many, np.minimum(p * share, 1)), many]
            new = np.c_[rng.binomial(few, np.minimum(q * share, 1)), few]
        found = paired_difference(old, new)
        assert found.low < found.high, "never a zero-width interval"
        covered.append(found.low <= q - p <= found.high)
        rejected.append(found.p <= 0.05)
    assert np.mean(covered) >= 0.93
    if p == q:
        assert np.mean(rejected) <= 0.06
