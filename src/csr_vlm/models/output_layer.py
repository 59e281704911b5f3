"""Compute the output layer of half-precision models in float32.

A logit near 20 has a spacing of 0.125 in bfloat16; rounding the logits alone changes the
log-probability of a response of 100 tokens by 0.4 nats in the median.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


class Float32Output(torch.nn.Linear):
    """Map half-precision hidden states to float32 logits, with the weights of a half-precision layer."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the logits, of shape (..., vocabulary)."""
        if hidden_states.is_cuda and not torch.is_grad_enabled() and self.bias is None:
            flat = hidden_states.flatten(0, -2)
            # The matrix units accumulate in float32 anyway; this only keeps the result from being rounded.
            logits = torch.mm(flat, self.weight.t(), out_dtype=torch.float32)
            return logits.unflatten(0, hidden_states.shape[:-1])
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(hidden_states.float(), self.weight.float(), bias)


def use_float32_output(model: Any) -> None:
    """Replace a half-precision model's output layer, keeping its weights."""
    layer = model.get_output_embeddings()
    if type(layer) is not torch.nn.Linear or layer.weight.dtype not in (torch.bfloat16, torch.float16):
        return
    with torch.device("meta"):
        replacement = Float32Output(layer.in_features, layer.out_features, bias=layer.bias is not None)
    replacement.weight, replacement.bias = layer.weight, layer.bias
    model.set_output_embeddings(replacement)
