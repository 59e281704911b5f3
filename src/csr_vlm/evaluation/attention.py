"""How much a policy looks at the image while it writes, layer by layer.

For a fixed response, the row of attention weights that predicts token k is a distribution over
everything before it. The mass on the image is the part of it that falls on image tokens, averaged
over heads. Two policies are compared on the SAME responses: on texts of their own, a change of
what they write would pass for a change of where they look.

Two things blur the raw mass. A longer text leaves the image a smaller share of what can be looked
at, so the mass is divided by the share that even attention would give it. And a few tokens, the
first above all, soak up weight whatever the input is (attention sinks): they are left out of
numerator and denominator, the same ones for both policies.
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
"""A token with at least so much of a layer's weight, on average over a response, is a sink."""
VIEWS = ("mass", "relative", "beyond_sinks")
"""Weight on the image; over its even share; the same without the sinks."""


@dataclass(frozen=True)
class Rows:
    """What a response's tokens attend to."""

    weights: torch.Tensor
    """Of shape (layers, response tokens, positions): means over heads, each row adding to 1."""
    image: torch.Tensor
    """Of shape (positions,): whether a position is an image token."""
    start: int
    """Length of the prompt: the first row stands at position start - 1 and sees ``start`` positions."""


def use_readable_attention(policy: Policy) -> None:
    """Switch to the eager implementation; the fused ones return no weights."""
    policy.base_model.set_attn_implementation("eager")


@torch.inference_mode()
def attention_rows(policy: Policy, prompt: Prompt, response_ids: Sequence[int]) -> Rows:
    """Compute the rows that predict a response's tokens, in one teacher-forced pass.

    Raises:
        CsrError: The model has no image tokens in its text, or returns no weights.
    """
    encoded = policy.encode(prompt)
    image_id = _image_id(policy)
    inputs = policy.model_inputs([encoded], [response_ids], "right")
    weights = policy.model(**inputs, use_cache=False, output_attentions=True).attentions
    if not weights or weights[0] is None:
        raise CsrError(f"{type(policy.base_model).__name__} returns no attention weights", "only eager models do")
    start, end = len(encoded.input_ids), len(encoded.input_ids) + len(response_ids)
    rows = torch.stack([layer[0, :, start - 1 : end - 1].float().mean(dim=0).cpu() for layer in weights])
    image = torch.zeros(rows.shape[-1], dtype=torch.bool)
    image[:start] = encoded.input_ids == image_id
    if not image.any():
        raise CsrError(f"{type(policy.base_model).__name__} has no image tokens in its prompt", "LLaVA-like models do")
    return Rows(rows, image, start)


def _image_id(policy: Policy) -> int:
    config = policy.base_model.config
    for name in ("image_token_id", "image_token_index"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    raise CsrError(f"{type(policy.base_model).__name__} names no image token", "LLaVA-like models do")


def sinks(rows: Sequence[Rows]) -> torch.Tensor:
    """Find the positions that soak up weight under any of some policies, on one response.

    Returns:
        Of shape (layers, positions); the first position is always one.
    """
    found = torch.stack([item.weights.mean(dim=1) >= SINK_SHARE for item in rows]).any(dim=0)
    found[:, 0] = True
    return found


def tallies(rows: Rows, excluded: torch.Tensor) -> dict[str, list[Tally]]:
    """Sum a response's tokens under each view: one (sum over tokens, tokens) a layer.

    Args:
        excluded: Of shape (layers, positions): the sinks.
    """
    num_layers, num_tokens, num_positions = rows.weights.shape
    positions = torch.arange(num_positions)
    seen = positions[None] < (rows.start + torch.arange(num_tokens))[:, None]  # (tokens, positions)
    even = rows.image.sum() / seen.sum(dim=-1)  # (tokens,)
    mass = (rows.weights * rows.image).sum(dim=-1)  # (layers, tokens)
    kept = ~excluded[:, None] & seen[None]  # (layers, tokens, positions)
    kept_image = kept & rows.image
    rest = (rows.weights * kept).sum(dim=-1).clamp(min=1e-9)
    beyond = (rows.weights * kept_image).sum(dim=-1) / rest
    even_beyond = kept_image.sum(dim=-1) / kept.sum(dim=-1).clamp(min=1)
    views = {"mass": mass, "relative": mass / even, "beyond_sinks": beyond / even_beyond.clamp(min=1e-9)}
    return {
        name: [(float(view[layer].sum()), float(num_tokens)) for layer in range(num_layers)]
        for name, view in views.items()
    }


def compare_attention(before: Sequence[Rows], after: Sequence[Rows]) -> list[dict[str, Difference]]:
    """Compare two policies' rows of the same responses.

    Returns:
        One mapping a layer: view to the difference, over response tokens, with an interval over responses.
    """
    old: list[dict[str, list[Tally]]] = []
    new: list[dict[str, list[Tally]]] = []
    for left, right in zip(before, after, strict=True):
        excluded = sinks([left, right])
        old.append(tallies(left, excluded))
        new.append(tallies(right, excluded))
    num_layers = before[0].weights.shape[0]
    return [
        {
            view: paired_difference([row[view][layer] for row in old], [row[view][layer] for row in new])
            for view in VIEWS
        }
        for layer in range(num_layers)
    ]


def protocol(num_responses: int) -> dict[str, Any]:
    return {
        "responses": f"{num_responses} chosen responses of iteration 1, the same for both policies",
        "pass": "one teacher-forced pass, eager attention, mean over heads",
        "sinks": f"the first position, and any with a mean weight of {SINK_SHARE} or more under either policy",
    }
