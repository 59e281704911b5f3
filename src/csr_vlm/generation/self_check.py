"""Check that log-probabilities from generation and from teacher forcing agree for a model.

A family that is not in the table of :mod:`csr_vlm.models.families` may need other inputs or
positions, and one that is may change with its library. So the check runs both ways on one prompt:

- The engine generates two sentences of at most eight tokens, the second continuing the first,
  with image features computed once and with this package's positions, and records each token's
  log-probability.
- The model scores the same tokens as transformers itself would: one forward pass from the
  pixels, with the positions that the model computes by default.
- Compared is the mean over the generated tokens of |generated - teacher-forced|, in nats per
  token. It must not exceed 1e-3 in float32 (:data:`TOLERANCE`) and 0.3 in other dtypes
  (:data:`HALF_TOLERANCE`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from csr_vlm.config.schema import SearchConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Expansion, Prompt
from csr_vlm.generation.transformers_engine import TransformersEngine
from csr_vlm.models.policy import Policy

TOLERANCE = {torch.float32: 1e-3}
"""Largest allowed mean difference by dtype, in nats per token."""
HALF_TOLERANCE = 0.3
"""Largest allowed mean difference in other dtypes, in nats per token; half precision alone gives
a few hundredths, wrong inputs of a trained model much more than 0.3."""


def self_check(policy: Policy, prompt: Prompt) -> float:
    """Return the mean |generated - teacher-forced| log-probability, in nats per token.

    Raises:
        CsrError: The difference exceeds the tolerance, or the model cannot generate at all.
    """
    name = type(policy.base_model).__name__
    try:
        token_ids, generated = _generate_two_sentences(policy, prompt)
        forced = logprobs_from_pixels(policy, prompt, token_ids)
    except CsrError:
        raise
    except Exception as error:
        # A model of an unknown family may fail anywhere in its own code.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CsrError(
            f"{name} cannot be used for generation: {reason}", "docs/families.md lists the supported model families"
        ) from None
    difference = float((torch.tensor(generated) - forced).abs().mean())
    tolerance = TOLERANCE.get(policy.base_model.dtype, HALF_TOLERANCE)
    # Written so that not-a-number fails too.
    if not difference <= tolerance:
        raise CsrError(
            f"{name}: log-probabilities from generation and teacher forcing differ by {difference:.3g} nats per "
            f"token; at most {tolerance} is allowed",
            "docs/families.md lists the supported model families",
        )
    return difference


def _generate_two_sentences(policy: Policy, prompt: Prompt) -> tuple[list[int], list[float]]:
    """Generate two sentences; return their token ids and log-probabilities."""
    engine = TransformersEngine(policy, attention="plain")
    config = SearchConfig(max_sentence_tokens=8)
    token_ids: list[int] = []
    logprobs: list[float] = []
    for index in range(2):
        request = Expansion(prompt, str(index) if index else "", tuple(token_ids), 2, (0, "selfcheck", index))
        candidate = engine.propose([request], config)[0][0]
        token_ids += candidate.token_ids
        logprobs += candidate.token_logprobs
        if token_ids[-1] in policy.eos_ids:
            break
    return token_ids, logprobs


@torch.inference_mode()
def logprobs_from_pixels(policy: Policy, prompt: Prompt, token_ids: Sequence[int]) -> torch.Tensor:
    """Compute log P(r_o | x, r_<o) with the model's own image path and positions.

    Returns:
        Log-probabilities in nats, of shape (tokens,), on the CPU.
    """
    encoded = policy.encode(prompt)
    inputs = policy.model_inputs([encoded], [token_ids], "right")
    del inputs["position_ids"]
    # Every response token is predicted at the position before it.
    logits = policy.model(**inputs, use_cache=False, logits_to_keep=len(token_ids) + 1).logits[0, :-1]
    predicted = torch.log_softmax(logits.float(), dim=-1)
    return predicted.gather(-1, torch.tensor(list(token_ids), device=predicted.device)[:, None]).squeeze(-1).cpu()
