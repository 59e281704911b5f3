"""Test the estimate of a scorer's quality without labels, on claims whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from csr_vlm.evaluation.statistics import auc
from csr_vlm.method.scorer_quality import FEWEST_CLAIMS, estimated_auc


def claims(effect: float, seed: int, habit: float = 0.0, number: int = 2000) -> tuple[list[tuple[float, float]], float]:
    """Draw cues of claims of which two in five are true, and the scorer's true AUC.

    Args:
        effect: Mean z of true claims.
        seed: Random seed.
        habit: By how much z follows how often the policy makes a claim, true or false.
        number: Number of claims.
    """
    rng = np.random.default_rng(seed)
    true = rng.random(number) < 0.4
    often = rng.normal(np.where(true, 0.8, -0.8), 0.6)
    z = rng.normal(np.where(true, effect, 0.0), 1.0) + habit * (often - np.where(true, 0.8, -0.8))
    return list(zip(z.tolist(), often.tolist(), strict=True)), auc(z[true].tolist(), z[~true].tolist())


@pytest.mark.parametrize("effect", [0.0, 0.5, 1.0, 2.0])
def test_the_estimate_is_near_the_truth_where_the_cues_err_independently(effect: float) -> None:
    cues, truth = claims(effect, seed=1)
    assert estimated_auc(cues) == pytest.approx(truth, abs=0.05)


def test_errors_that_both_cues_share_are_not_seen() -> None:
    """Show a limit that the documentation names."""
    cues, truth = claims(0.5, seed=2, habit=1.0)
    estimate = estimated_auc(cues)
    assert estimate is not None
    assert estimate > truth + 0.05


def test_a_scorer_that_prefers_what_is_false_is_below_chance() -> None:
    cues, _ = claims(-1.0, seed=3)
    estimate = estimated_auc(cues)
    assert estimate is not None
    assert estimate < 0.4


def test_there_is_no_estimate_without_enough_claims_or_contrast() -> None:
    cues, _ = claims(1.0, seed=4)
    assert estimated_auc(cues[: FEWEST_CLAIMS - 1]) is None
    assert estimated_auc([(z, 0.0) for z, _ in cues]) is None
    assert estimated_auc([]) is None
