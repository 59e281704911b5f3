"""Ratios and their intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csr_vlm.evaluation.statistics import Metric, ratio


def test_a_hand_worked_ratio_of_sums():
    # 3 hallucinated mentions of 8, not the mean 0.5625 of 1/2, 2/2, 0/4 ... over prompts.
    found = ratio([1, 2, 0], [2, 2, 4])
    assert found.value == pytest.approx(3 / 8)
    assert found.n == 3


def test_a_prompt_without_mentions_counts_as_a_prompt():
    found = ratio([1, 0], [2, 0])
    assert found.value == 0.5
    assert found.n == 2


@pytest.mark.parametrize(("top", "bottom"), [([], []), ([0, 0], [0, 0])])
def test_a_zero_denominator_gives_none(top, bottom):
    assert ratio(top, bottom) == Metric(None, None, None, len(top))


@pytest.mark.parametrize(("top", "bottom"), [([1], [1, 2]), ([[1]], [[1]])])
def test_unequal_lengths_are_refused(top, bottom):
    with pytest.raises(ValueError, match="one length"):
        ratio(top, bottom)


def test_it_is_deterministic_and_follows_its_seed():
    rng = np.random.default_rng(0)
    top, bottom = rng.integers(0, 3, 80), rng.integers(3, 6, 80)
    assert ratio(top, bottom) == ratio(top, bottom)
    other = ratio(top, bottom, seed=1)
    assert other.value == ratio(top, bottom).value
    assert (other.low, other.high) != (ratio(top, bottom).low, ratio(top, bottom).high)


def test_no_variation_no_doubt():
    assert ratio([1] * 10, [2] * 10) == Metric(0.5, 0.5, 0.5, 10)


def test_the_interval_is_that_of_a_proportion():
    # 200 of 400: the normal interval is 0.5 -+ 1.96 * sqrt(0.25 / 400) = 0.451 .. 0.549.
    found = ratio([1, 0] * 200, [1] * 400)
    assert found.low == pytest.approx(0.451, abs=0.006)
    assert found.high == pytest.approx(0.549, abs=0.006)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(80):
        bottom = rng.integers(1, 5, 100)
        found = ratio(rng.binomial(bottom, 0.3), bottom)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0.3 <= found.high
    assert 0.88 <= hits / 80 <= 0.995


def test_mentions_of_one_prompt_may_depend_on_each_other():
    """Ten equal mentions in each of twenty prompts are worth twenty, not two hundred."""
    clustered, spread = ratio([10, 0] * 10, [10] * 20), ratio([1, 0] * 100, [1] * 200)
    assert clustered.value == spread.value == 0.5
    assert clustered.high - clustered.low > 2 * (spread.high - spread.low)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=30))
def test_the_interval_is_within_the_prompts_own_ratios(rows):
    top, bottom = [min(a, b) for a, b in rows], [b for _, b in rows]
    found = ratio(top, bottom)
    if sum(bottom) == 0:
        assert found.value is None
        return
    each = [a / b for a, b in zip(top, bottom, strict=True) if b]
    assert found.value is not None
    assert min(each) - 1e-9 <= found.low <= found.high <= max(each) + 1e-9
    assert found.dump() == {"value": found.value, "low": found.low, "high": found.high, "n": len(rows)}
