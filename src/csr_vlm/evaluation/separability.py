"""How well a policy tells the chosen responses of some pairs from the rejected ones.

Pairs that the policy separates already teach it little; pairs it gets wrong, or calls equal, are
where it can learn. After training on them it should separate them better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from csr_vlm.core.batching import batched
from csr_vlm.core.records import Prompt
from csr_vlm.evaluation.statistics import Metric, auc, ratio
from csr_vlm.models.policy import Policy

_BATCH = 16
_RESAMPLES = 500


@dataclass(frozen=True)
class TokenPair:
    """A pair as a policy reads it."""

    prompt: Prompt
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]


@dataclass(frozen=True)
class LogProbs:
    """Log-probabilities of some pairs under one policy, in nats a token."""

    chosen: tuple[float, ...]
    rejected: tuple[float, ...]


def logprobs(policy: Policy, pairs: Sequence[TokenPair]) -> LogProbs:
    """Compute log P(y | x) / tokens of both sides of each pair, by teacher forcing."""
    sides: list[list[float]] = []
    for side in ("chosen_ids", "rejected_ids"):
        found: list[float] = []
        for batch in batched(pairs, _BATCH):
            forced = policy.teacher_forced([pair.prompt for pair in batch], [getattr(pair, side) for pair in batch])
            found += [float(row.mean()) for row in forced]
        sides.append(found)
    return LogProbs(tuple(sides[0]), tuple(sides[1]))


def separability(chosen: Sequence[float], rejected: Sequence[float]) -> dict[str, Any]:
    """Say how a score tells chosen from rejected.

    Returns:
        ``margin``, mean of chosen - rejected; ``preferred``, share of pairs with chosen above
        rejected, equal ones counting half; ``auc``, P(a chosen > a rejected of any pair). Each with
        a 95 % bootstrap interval over pairs.
    """
    ones = [1.0] * len(chosen)
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    preferred = [float(np.sign(margin) + 1) / 2 for margin in margins]
    return {
        "margin": ratio(margins, ones).dump(),
        "preferred": ratio(preferred, ones).dump(),
        "auc": auc_metric(chosen, rejected).dump(),
    }


def implicit_reward(policy: LogProbs, reference: LogProbs) -> LogProbs:
    """DPO's reward over beta, a token: (log pi(y | x) - log pi_ref(y | x)) / tokens."""
    return LogProbs(
        tuple(a - b for a, b in zip(policy.chosen, reference.chosen, strict=True)),
        tuple(a - b for a, b in zip(policy.rejected, reference.rejected, strict=True)),
    )


def auc_metric(positive: Sequence[float], negative: Sequence[float], seed: int = 0) -> Metric:
    """AUC with a percentile bootstrap interval; item i of both sides is one pair, drawn together."""
    high, low = np.asarray(positive), np.asarray(negative)
    draws = np.random.default_rng(seed).integers(0, len(high), (_RESAMPLES, len(high)))
    ends = np.percentile([auc(high[draw].tolist(), low[draw].tolist()) for draw in draws], [2.5, 97.5])
    return Metric(auc(positive, negative), float(ends[0]), float(ends[1]), len(high))
