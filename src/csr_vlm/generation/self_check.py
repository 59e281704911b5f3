"""Whether a model generates and scores as this package believes it does.

A family that is not in the table may want other inputs or positions; and one that is may
change with its library. So a model writes a few words in two steps, as the search does,
and is then asked for their probability the way transformers itself would: from the
pixels, in one pass, with the positions that the model makes up by itself.
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
HALF_TOLERANCE = 0.3
"""Nats a token, on average; half precision alone gives a few hundredths, and wrong inputs
of a trained model much more than this."""


def self_check(policy: Policy, prompt: Prompt) -> float:
    """Return the mean |generated - teacher-forced| log-probability, in nats a token.

    Raises:
        CsrError: They differ by more than rounding, or the model cannot be driven at all.
    """
    name = type(policy.base_model).__name__
    try:
        ids, generated = _two_sentences(policy, prompt)
        forced = plain_logprobs(policy, prompt, ids)
    except CsrError:
        raise
    except Exception as error:
        # A model of an unknown family may fail anywhere in its own code.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CsrError(f"{name} cannot be driven: {reason}", "docs/families.md lists what is known to work") from None
    difference = float((torch.tensor(generated) - forced).abs().mean())
    allowed = TOLERANCE.get(policy.base_model.dtype, HALF_TOLERANCE)
    if not difference <= allowed:
        raise CsrError(
            f"{name} gives its own words other probabilities when it is asked again: {difference:.3g} nats a token, "
            f"where {allowed} is allowed",
            "docs/families.md lists what is known to work",
        )
    return difference


def _two_sentences(policy: Policy, prompt: Prompt) -> tuple[list[int], list[float]]:
    engine = TransformersEngine(policy, attention="plain")
    config = SearchConfig(max_sentence_tokens=8)
    ids: list[int] = []
    logprobs: list[float] = []
    for step in range(2):
        request = Expansion(prompt, str(step) if step else "", tuple(ids), 2, (0, "selfcheck", step))
        candidate = engine.propose([request], config)[0][0]
        ids += candidate.token_ids
        logprobs += candidate.token_logprobs
        if ids[-1] in policy.eos_ids:
            break
    return ids, logprobs


@torch.inference_mode()
def plain_logprobs(policy: Policy, prompt: Prompt, ids: Sequence[int]) -> torch.Tensor:
    """Compute log P(r_o | x, r_<o) with the model's own image path and positions."""
    encoded = policy.encode(prompt)
    inputs = policy.model_inputs([encoded], [ids], "right")
    del inputs["position_ids"]
    logits = policy.model(**inputs, use_cache=False).logits[0].float()
    start = len(encoded.input_ids)
    predicted = torch.log_softmax(logits[start - 1 : start - 1 + len(ids)], dim=-1)
    return predicted.gather(-1, torch.tensor(list(ids), device=predicted.device)[:, None]).squeeze(-1).cpu()
