"""Verify the reference log-probabilities of a ledger, and compute them where they do not hold.

The engine is the policy of the last iteration, so the ledger's log-probabilities are the reference's.
A sample is compared with a teacher-forced pass before training. Both are computed with the output
layer in float32 (:mod:`csr_vlm.models.output_layer`). They may differ by

    tolerance + 3 sqrt(n) 16 eps / sqrt(12)

nats for n tokens, with the configured tolerance and the machine epsilon of the model's data type.
Values of 16 to 32, such as typical logits, have a spacing of 16 eps in that type (0.125 in bfloat16);
rounding to it has a standard deviation of 16 eps / sqrt(12), and n independent errors add up to
sqrt(n) times that. In float32 the second term vanishes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch

from csr_vlm.core.batching import evenly_spaced
from csr_vlm.core.records import Pair
from csr_vlm.models.policy import Policy
from csr_vlm.store import files
from csr_vlm.store.tables import PairFiles
from csr_vlm.training.distribution import sum_over_processes

_NUM_VERIFIED_PAIRS = 16
"""Pairs whose reference log-probabilities are verified before training."""
_NUM_TOGETHER = 64
"""Pairs that are read at once where all are computed."""


def reference_tolerance(tolerance: float, dtype: torch.dtype, num_tokens: int) -> float:
    """Return the largest accepted difference of a response of ``num_tokens`` tokens, in nats.

    Example:
        >>> round(reference_tolerance(0.05, torch.bfloat16, 100), 2)
        1.13
        >>> round(reference_tolerance(0.05, torch.float32, 100), 4)
        0.05
    """
    return tolerance + 3 * sqrt(num_tokens) * 16 * torch.finfo(dtype).eps / sqrt(12)


def verify_reference(policy: Policy, pairs: PairFiles, tolerance: float, max_tokens: int) -> tuple[float, bool]:
    """Compare the ledger with a teacher-forced pass on both responses of sixteen pairs, spread over all.

    Returns:
        The largest difference of a response in nats, and whether all are within their tolerance.
    """
    sample = pairs[evenly_spaced(range(len(pairs)), _NUM_VERIFIED_PAIRS)]
    computed = _logprobs(policy, sample, max_tokens)
    differences, holds = [0.0], True
    for pair, values in zip(sample, computed, strict=True):
        for response, value in zip((pair.chosen, pair.rejected), values, strict=True):
            differences.append(abs(value - response.logprob))
            allowed = reference_tolerance(tolerance, policy.base_model.dtype, len(response.token_ids))
            holds = holds and differences[-1] <= allowed
    return max(differences), holds


def compute_reference(
    policy: Policy,
    pairs: PairFiles,
    path: Path,
    max_tokens: int,
    process: int,
    num_processes: int,
    ld_alpha: float | None = None,
) -> Any:
    """Compute the reference log-probabilities of all pairs, after the tokens they share, unless ``path`` has them.

    Each process computes a share. All must call this. With ``ld_alpha``, tokens beyond the length of the
    shorter response of a pair have that weight, as TRL weights the policy's (LD-DPO, arXiv 2409.06411).

    Returns:
        An array of shape (pairs, 2), in nats, that is read from the file as needed.
    """
    if not path.exists():
        values = np.zeros((len(pairs), 2), dtype=np.float32)
        share = np.array_split(np.arange(len(pairs)), num_processes)[process]
        for start in range(0, len(share), _NUM_TOGETHER):
            numbers = share[start : start + _NUM_TOGETHER]
            read = pairs[numbers]
            values[numbers] = _logprobs(policy, read, max_tokens, ld_alpha, [pair.shared_tokens for pair in read])
        values = sum_over_processes(values)
        if process == 0:
            files.write_array(path, values)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _logprobs(
    policy: Policy,
    pairs: Sequence[Pair],
    max_tokens: int,
    ld_alpha: float | None = None,
    skipped: Sequence[int] | None = None,
) -> list[tuple[float, float]]:
    """Compute the log-probabilities of both responses of pairs, without the first ``skipped`` tokens of each pair."""
    policy.model.eval()
    prompts = [pair.prompt for pair in pairs for _ in range(2)]
    responses = [response.token_ids for pair in pairs for response in (pair.chosen, pair.rejected)]
    computed = policy.teacher_forced(prompts, responses, max_tokens)
    tail_weight = 1.0 if ld_alpha is None else ld_alpha
    sums = []
    for number, sides in enumerate(zip(computed[::2], computed[1::2], strict=True)):
        chosen, rejected = (side[skipped[number] if skipped else 0 :] for side in sides)
        shared = min(len(chosen), len(rejected))
        weighted = (float(side[:shared].sum() + tail_weight * side[shared:].sum()) for side in (chosen, rejected))
        sums.append((next(weighted), next(weighted)))
    return sums
