"""Measure how well a policy separates the chosen from the rejected responses of preference pairs.

A policy learns little from pairs that it already separates, and most from pairs that it gets wrong
or rates equal. After training on the pairs it should separate them better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from csr_vlm.core.batching import batched
from csr_vlm.core.records import Prompt
from csr_vlm.evaluation.statistics import auc_metric, ratio
from csr_vlm.models.policy import Policy

_BATCH = 16


@dataclass(frozen=True)
class TokenPair:
    """Represent a preference pair by token ids."""

    prompt: Prompt
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]


@dataclass(frozen=True)
class PairLogprobs:
    """Hold mean log-probabilities of pairs under one policy, in nats per token, pair by pair."""

    chosen: tuple[float, ...]
    rejected: tuple[float, ...]


def pair_logprobs(policy: Policy, pairs: Sequence[TokenPair]) -> PairLogprobs:
    """Compute log P(y | x) / number of tokens for both responses of each pair, by teacher forcing."""
    sides: list[list[float]] = []
    for side in ("chosen_ids", "rejected_ids"):
        values: list[float] = []
        for batch in batched(pairs, _BATCH):
            forced = policy.teacher_forced([pair.prompt for pair in batch], [getattr(pair, side) for pair in batch])
            values += [float(row.mean()) for row in forced]
        sides.append(values)
    return PairLogprobs(tuple(sides[0]), tuple(sides[1]))


def separability(chosen: Sequence[float], rejected: Sequence[float]) -> dict[str, Any]:
    """Compute how well a score separates chosen from rejected.

    Returns:
        ``margin``, the mean of chosen - rejected; ``preferred``, the share of pairs with chosen >
        rejected, where equality counts one half; ``auc``, the probability that a chosen response
        scores higher than a rejected one of any pair. Each with a 95 % interval over pairs.
    """
    ones = [1.0] * len(chosen)
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    preferred = [float(np.sign(margin) + 1) / 2 for margin in margins]
    return {
        "margin": ratio(margins, ones).dump(),
        "preferred": ratio(preferred, ones).dump(),
        "auc": auc_metric(chosen, rejected).dump(),
    }


def implicit_reward(policy: PairLogprobs, reference: PairLogprobs) -> PairLogprobs:
    """Compute DPO's reward over beta, per token: (log pi(y | x) - log pi_ref(y | x)) / number of tokens."""
    return PairLogprobs(
        tuple(a - b for a, b in zip(policy.chosen, reference.chosen, strict=True)),
        tuple(a - b for a, b in zip(policy.rejected, reference.rejected, strict=True)),
    )
