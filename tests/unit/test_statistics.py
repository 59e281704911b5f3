"""Test metrics, their intervals and the paired tests on numbers that can be checked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csr_vlm.evaluation.statistics import Metric, auc, holm, mcnemar, paired_difference, pooled, ratio, tango


def test_a_hand_worked_ratio_of_sums():
    # 3 hallucinated mentions of 8; not 0.5, the mean of 1/2, 2/2 and 0/4 over prompts.
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
    with pytest.raises(ValueError, match="same length"):
        ratio(top, bottom)


def test_equal_prompts_still_have_an_interval_with_a_width():
    for top, bottom in (([0] * 30, [1] * 30), ([1] * 30, [1] * 30), ([1] * 10, [2] * 10), ([3] * 10, [1] * 10)):
        found = ratio(top, bottom)
        assert found == ratio(top, bottom)
        assert found.low <= found.value <= found.high
        assert found.high - found.low > 0.01
    assert ratio([-1], [1]) == Metric(-1.0, None, None, 1), "one signed value says nothing about the spread"


@pytest.mark.parametrize(("events", "n"), [(0, 30), (1, 30), (7, 30), (30, 30), (2, 500)])
def test_a_share_of_independent_prompts_is_near_scipys_clopper_pearson(events, n):
    from scipy.stats import binomtest

    found = ratio([1] * events + [0] * (n - events), [1] * n)
    exact = binomtest(events, n).proportion_ci(method="exact")
    # Student's t and the jackknife's n - 1 make the effective sample a little smaller, so the interval is wider.
    assert found.low <= exact.low + 1e-9
    assert found.high >= exact.high - 1e-9
    assert (found.low, found.high) == (pytest.approx(exact.low, abs=0.02), pytest.approx(exact.high, abs=0.02))


@pytest.mark.parametrize(("gained", "lost", "n"), [(0, 0, 30), (0, 5, 30), (3, 9, 100), (30, 0, 30)])
def test_tangos_interval_inverts_the_constrained_score_test(gained, lost, n):
    """Maximize the likelihood of the discordant cells numerically; the score of both bounds is z."""
    from scipy.optimize import minimize_scalar

    def score(d):
        def loss(q):
            cells = ((gained, q + d), (lost, q), (n - gained - lost, 1 - 2 * q - d))
            return -sum(count * np.log(max(p, 1e-300)) for count, p in cells if count)

        low, high = max(0.0, -d), (1 - d) / 2
        q = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
        return (gained - lost - n * d) / np.sqrt(n * (2 * q + d * (1 - d)))

    low, high = tango(gained, lost, n)
    assert low < (gained - lost) / n or low == -1
    for bound in (low, high):
        if abs(bound) < 1:
            assert abs(score(bound)) == pytest.approx(1.959964, abs=1e-3)


def test_the_interval_matches_that_of_a_proportion():
    # 200 of 400: the normal interval is 0.5 -+ 1.96 * sqrt(0.25 / 400) = 0.451 .. 0.549.
    found = ratio([1, 0] * 200, [1] * 400)
    assert found.low == pytest.approx(0.451, abs=0.006)
    assert found.high == pytest.approx(0.549, abs=0.006)


def test_mentions_of_one_prompt_are_resampled_together():
    """Ten equal mentions in each of twenty prompts count as twenty observations, not two hundred."""
    clustered, spread = ratio([10, 0] * 10, [10] * 20), ratio([1, 0] * 100, [1] * 200)
    assert clustered.value == spread.value == 0.5
    assert clustered.high - clustered.low > 2 * (spread.high - spread.low)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=30))
def test_the_interval_of_a_share_holds_its_value_and_has_a_width(rows):
    top, bottom = [min(a, b) for a, b in rows], [b for _, b in rows]
    found = ratio(top, bottom)
    if sum(bottom) == 0:
        assert found.value is None
        return
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high
    assert found.dump() == {"value": found.value, "low": found.low, "high": found.high, "n": len(rows)}


def test_pooled_metrics_are_ratios_of_sums():
    rows = [{"chair_i": (1, 2), "asked": (1, 1)}, {"chair_i": (0, 4)}]
    found = pooled(rows)
    assert found == {"chair_i": ratio([1, 0], [2, 4]), "asked": ratio([1], [1])}


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    # 2 (1) / 2^5, 2 (1 + 6) / 2^6; evenly split is no evidence; none changed is none either.
    [(0, 5, 0.0625), (1, 5, 0.21875), (5, 1, 0.21875), (4, 4, 1.0), (0, 0, 1.0), (0, 1, 1.0)],
)
def test_mcnemar_by_hand(gained, lost, p):
    assert mcnemar(gained, lost) == pytest.approx(p)


def test_mcnemar_of_many_prompts_neither_overflows_nor_underflows():
    # Normal approximation with continuity correction: z = 199 / sqrt(100000), p = 0.529.
    assert mcnemar(50_100, 49_900) == pytest.approx(0.529, abs=0.001)


def test_a_hand_worked_paired_difference_of_ratios():
    # 3 of 6 mentions before, 1 of 5 after.
    found = paired_difference([(1, 2), (2, 4)], [(0, 1), (1, 4)])
    assert (found.before, found.after) == (0.5, 0.2)
    assert found.value == pytest.approx(-0.3)
    assert found.n == 2


def test_the_permutation_test_by_enumeration():
    # Exchanging whole prompts: |D| over the eight signs of 3, 1, 1 is at least 5 twice.
    found = paired_difference([(0, 1), (0, 1), (0, 1)], [(3, 1), (1, 1), (1, 1)])
    assert found.test == "paired permutation"
    assert found.p == pytest.approx(2 / 8, abs=0.015)


def test_binary_outcomes_are_tested_with_mcnemar():
    before, after = [(1, 1)] * 5 + [(0, 1)] * 3, [(0, 1)] * 5 + [(0, 1)] * 3
    found = paired_difference(before, after)
    assert (found.test, found.p) == ("McNemar, exact", pytest.approx(0.0625))
    assert found.value == pytest.approx(-5 / 8)


def test_both_tests_of_a_binary_outcome_agree():
    rng = np.random.default_rng(3)
    old = rng.integers(0, 2, 200)
    new = np.where(rng.random(200) < 0.15, 1 - old, old)
    exact = paired_difference([(a, 1) for a in old], [(b, 1) for b in new])
    permuted = paired_difference([(2 * a, 2) for a in old], [(2 * b, 2) for b in new])
    assert (exact.test, permuted.test) == ("McNemar, exact", "paired permutation")
    assert permuted.p == pytest.approx(exact.p, abs=0.03)


def test_pairing_makes_a_small_change_significant():
    """Compare the same two ratios with all prompts slightly worse and with shuffled prompts."""
    rng = np.random.default_rng(0)
    old = rng.integers(0, 50, 200)
    paired = paired_difference([(a, 50) for a in old], [(a + 1, 50) for a in old])
    shuffled = paired_difference([(a, 50) for a in old], [(a + 1, 50) for a in rng.permutation(old)])
    assert paired.value == pytest.approx(shuffled.value)
    assert paired.low > 0
    assert shuffled.low < 0 < shuffled.high
    assert paired.p < 0.001 < 0.1 < shuffled.p


def test_the_false_positive_rate_matches_the_level():
    rng, hits = np.random.default_rng(5), 0
    for _ in range(60):
        both = rng.integers(0, 4, (40, 2))
        found = paired_difference([(a, 4) for a, _ in both], [(b, 4) for _, b in both])
        hits += found.p < 0.2
    assert 4 <= hits <= 22, "about 12 of 60 at the level 0.2"


def test_the_difference_is_undefined_where_a_policy_has_no_value():
    found = paired_difference([(0, 0)], [(1, 1)])
    assert (found.before, found.after, found.value, found.p) == (None, 1.0, None, None)


def test_both_policies_must_have_the_same_number_of_prompts():
    with pytest.raises(ValueError, match="same prompts"):
        paired_difference([(1, 1)], [])


@settings(max_examples=20)
@given(st.lists(st.tuples(*[st.integers(0, 3), st.integers(1, 4)] * 2), min_size=2, max_size=20))
def test_swapping_the_policies_negates_the_difference(rows):
    old, new = [(a, b) for a, b, _, _ in rows], [(c, d) for _, _, c, d in rows]
    there, back = paired_difference(old, new), paired_difference(new, old)
    assert there.value == pytest.approx(-back.value)
    assert (there.low, there.high) == (pytest.approx(-back.high), pytest.approx(-back.low))
    assert there.p == pytest.approx(back.p)
    assert 0 < there.p <= 1


def test_holm_by_hand():
    assert holm([0.01, 0.5, 0.02]) == pytest.approx([0.03, 0.5, 0.04])
    assert holm([0.04, 0.03]) == pytest.approx([0.06, 0.06]), "never smaller than a smaller one's"
    assert holm([]) == []


def test_auc_by_hand():
    assert auc([2.0, 1.0], [1.0, 0.0]) == pytest.approx(3.5 / 4)
    assert auc([0.0], [1.0]) == 0.0
