"""Measure how much attention a policy pays to the image while it generates, layer by layer.

For a fixed response, the attention weights that predict token k are a distribution over all
earlier positions. The mass on the image is the sum of the weights on image tokens, averaged over
heads. Two policies are compared on the SAME responses: if each were measured on responses of its
own, a change in what it writes would be mistaken for a change in where it looks.

Two confounders are removed from the raw mass. First, in a longer text the image is a smaller share
of all positions, so the mass is divided by the share that uniform attention would give the image.
Second, a few tokens, above all the first one, receive a large weight whatever the input is
(attention sinks); they are excluded from numerator and denominator, the same ones for both policies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt
from csr_vlm.evaluation.statistics import Difference, Tally, paired_difference
from csr_vlm.models.policy import Policy

SINK_SHARE = 0.2
"""A token whose weight in a layer, averaged over a response, is at least this is an attention sink."""
VIEWS = ("mass", "relative", "beyond_sinks")
"""Attention to the image: raw; divided by the uniform share; the latter without attention sinks."""
_SUPPORTED = "use a model with image tokens in its prompt, such as LLaVA"


@dataclass(frozen=True)
class ResponseAttention:
    """Hold the attention weights that predict the tokens of one response.

    A response of two tokens to a prompt of four, under a policy with one layer::

        weights  [[[0.10, 0.30, 0.30, 0.30, 0.00],     # predicts the first token: sees 4 positions
                   [0.10, 0.10, 0.20, 0.30, 0.30]]]    # predicts the second token: sees 5
        image    [False, True, True, False, False]
        start    4
    """

    weights: torch.Tensor
    """Of shape (layers, response tokens, positions): means over heads; each row sums to 1."""
    image: torch.Tensor
    """Of shape (positions,): whether a position is an image token."""
    start: int
    """Length of the prompt: the first row is the query at position start - 1 and sees ``start`` positions."""


def use_eager_attention(policy: Policy) -> None:
    """Switch to the eager attention implementation; fused implementations do not return weights."""
    policy.base_model.set_attn_implementation("eager")


@torch.inference_mode()
def response_attention(policy: Policy, prompt: Prompt, response_ids: Sequence[int]) -> ResponseAttention:
    """Compute the weights that predict a response's tokens, in one teacher-forced pass.

    Raises:
        CsrError: The model's prompt has no image tokens, or the model returns no weights.
    """
    encoded = policy.encode(prompt)
    image_id = _image_token_id(policy)
    inputs = policy.model_inputs([encoded], [response_ids], "right")
    weights = policy.model(**inputs, use_cache=False, output_attentions=True).attentions
    name = type(policy.base_model).__name__
    if not weights or weights[0] is None:
        raise CsrError(f"{name} returns no attention weights", "use a model with an eager attention implementation")
    start, end = len(encoded.input_ids), len(encoded.input_ids) + len(response_ids)
    rows = torch.stack([layer[0, :, start - 1 : end - 1].float().mean(dim=0).cpu() for layer in weights])
    image = torch.zeros(rows.shape[-1], dtype=torch.bool)
    image[:start] = encoded.input_ids == image_id
    if not image.any():
        raise CsrError(f"the prompt of {name} contains no image tokens", _SUPPORTED)
    return ResponseAttention(rows, image, start)


def _image_token_id(policy: Policy) -> int:
    config = policy.base_model.config
    for name in ("image_token_id", "image_token_index"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    raise CsrError(f"the config of {type(policy.base_model).__name__} names no image token", _SUPPORTED)


def attention_sinks(attentions: Sequence[ResponseAttention]) -> torch.Tensor:
    """Find the positions that are attention sinks under any of several policies, for one response.

    Returns:
        Boolean tensor of shape (layers, positions); the first position is always a sink.
    """
    sinks = torch.stack([item.weights.mean(dim=1) >= SINK_SHARE for item in attentions]).any(dim=0)
    sinks[:, 0] = True
    return sinks


def tallies(attention: ResponseAttention, sinks: torch.Tensor) -> dict[str, list[Tally]]:
    """Sum each of ``VIEWS`` over a response's tokens: one (sum over tokens, number of tokens) per layer.

    Args:
        sinks: Boolean tensor of shape (layers, positions): the positions to exclude.
    """
    num_layers, num_tokens, num_positions = attention.weights.shape
    positions = torch.arange(num_positions)
    visible = positions[None] < (attention.start + torch.arange(num_tokens))[:, None]  # (tokens, positions)
    uniform = attention.image.sum() / visible.sum(dim=-1)  # (tokens,)
    mass = (attention.weights * attention.image).sum(dim=-1)  # (layers, tokens)
    kept = ~sinks[:, None] & visible[None]  # (layers, tokens, positions)
    kept_image = kept & attention.image
    kept_mass = (attention.weights * kept).sum(dim=-1).clamp(min=1e-9)
    beyond = (attention.weights * kept_image).sum(dim=-1) / kept_mass
    uniform_beyond = kept_image.sum(dim=-1) / kept.sum(dim=-1).clamp(min=1)
    views = {"mass": mass, "relative": mass / uniform, "beyond_sinks": beyond / uniform_beyond.clamp(min=1e-9)}
    return {
        name: [(float(view[layer].sum()), float(num_tokens)) for layer in range(num_layers)]
        for name, view in views.items()
    }


def compare_attention(
    before: Sequence[ResponseAttention], after: Sequence[ResponseAttention]
) -> list[dict[str, Difference]]:
    """Compare the attention of two policies on the same responses.

    Returns:
        One mapping per layer: view to the difference over response tokens, with an interval over responses.
    """
    before_tallies: list[dict[str, list[Tally]]] = []
    after_tallies: list[dict[str, list[Tally]]] = []
    for left, right in zip(before, after, strict=True):
        sinks = attention_sinks([left, right])
        before_tallies.append(tallies(left, sinks))
        after_tallies.append(tallies(right, sinks))
    num_layers = before[0].weights.shape[0]
    return [
        {
            view: paired_difference(
                [row[view][layer] for row in before_tallies], [row[view][layer] for row in after_tallies]
            )
            for view in VIEWS
        }
        for layer in range(num_layers)
    ]


def protocol(num_responses: int) -> dict[str, Any]:
    """Describe how attention was measured."""
    return {
        "responses": f"{num_responses} chosen responses of iteration 1, the same for both policies",
        "pass": "one teacher-forced pass, eager attention, mean over heads",
        "sinks": f"the first position, and any with a mean weight of {SINK_SHARE} or more under either policy",
    }
