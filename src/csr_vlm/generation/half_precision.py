"""Prepare half-precision policies for decoding: fewer operations a step, checked against the policy as trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import PeftModel

from csr_vlm.core.records import Prompt
from csr_vlm.generation.self_check import logprobs_from_pixels
from csr_vlm.generation.shared_attention import is_gpu
from csr_vlm.models.decoding_layers import use_fused_norms, use_plain_lora
from csr_vlm.models.policy import Policy

TOLERANCE = 0.1
"""Largest allowed mean difference, in nats per token; rounding to half precision gives a few hundredths."""
_NUM_TOKENS = 8


def prepare_half_precision(policy: Policy, example: Prompt, log: Callable[[str], None]) -> None:
    """Replace layers by those of :mod:`csr_vlm.models.decoding_layers`, unless log-probabilities change.

    Compared are the log-probabilities of the prompt's last tokens, as its response, before and
    after. In float32 the adapter is merged (:func:`csr_vlm.models.loading.load_policy`) and nothing
    is replaced.

    Args:
        policy: Policy as training loads it, with its adapter in float32 beside the weights.
        example: Prompt to compare with.
        log: Called with what was chosen.
    """
    dtype = policy.base_model.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return
    special_ids = {*policy.image_token_ids, *policy.eos_ids}
    token_ids = [token for token in policy.encode(example).input_ids.tolist() if token not in special_ids]
    token_ids = token_ids[-_NUM_TOKENS:]
    expected = logprobs_from_pixels(policy, example, token_ids)
    undo = [use_plain_lora(policy.model, dtype)]
    if is_gpu(policy.device):
        undo.append(use_fused_norms(policy.base_model.get_decoder()))
    difference = float((logprobs_from_pixels(policy, example, token_ids) - expected).abs().mean())
    name = str(dtype).removeprefix("torch.")
    # Written so that not-a-number fails too.
    if not difference <= TOLERANCE:
        for restore in undo:
            restore()
        log(
            f"generating with the layers of training, which is slower: in {name}, log-probabilities differ by "
            f"{difference:.3g} nats a token; at most {TOLERANCE} is allowed"
        )
    elif isinstance(policy.model, PeftModel):
        log(
            f"generating with the adapter in {name} beside the weights: log-probabilities differ by {difference:.2g} "
            "nats a token from those with the adapter as trained"
        )
