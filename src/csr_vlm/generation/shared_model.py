"""Split a policy's model for shared attention: prefill prompts, then decode rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from csr_vlm.generation import shared_attention
from csr_vlm.generation.counters import Counters
from csr_vlm.models.encoding import EncodedPrompt
from csr_vlm.models.policy import Policy


@dataclass(frozen=True)
class Prefill:
    """Hold the results of prefilling one prompt and, where given, a partial response."""

    kv: torch.Tensor
    """Keys and values of shape (layers, 2, key heads, tokens, head size)."""
    hidden_state: torch.Tensor
    """Final hidden state of the last token, of shape (width,)."""
    next_position: int
    """Position id of the next token; differs from the number of tokens where images count otherwise."""


class SharedModel:
    """Prefill prompts with the whole model, and decode rows with its language model alone."""

    def __init__(self, policy: Policy, counters: Counters) -> None:
        self.policy = policy
        self.counters = counters
        model = policy.base_model
        self._body: Any = model.base_model
        self._decoder: Any = model.get_decoder()
        self._embed: Any = model.get_input_embeddings()
        self._head: Any = model.get_output_embeddings()
        # Transformers passes a four-dimensional mask on unchanged; shared attention ignores it.
        self._no_mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=policy.device)
        shared_attention.install(self._decoder)

    def prefill(self, encoded: Sequence[EncodedPrompt], prefixes: Sequence[Sequence[int]]) -> list[Prefill]:
        """Prefill prompts, each followed by the token ids of a partial response, in one forward pass."""
        inputs = self.policy.model_inputs(encoded, prefixes, "left")
        cache = DynamicCache()
        output = self._body(**inputs, use_cache=True, past_key_values=cache)
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        self.counters.count_prefill(sum(lengths))
        # (layers, 2, rows, key heads, tokens, head size)
        kv = torch.stack([torch.stack([layer.keys, layer.values]) for layer in cache.layers])
        last_hidden_states = output.last_hidden_state[:, -1].clone()
        return [
            Prefill(kv[:, :, row, :, kv.shape[4] - length :], last_hidden_states[row], length + item.position_delta)
            for row, (length, item) in enumerate(zip(lengths, encoded, strict=True))
        ]

    def decode(
        self, tokens: torch.Tensor, positions: torch.Tensor, decode_step: shared_attention.DecodeStep
    ) -> torch.Tensor:
        """Feed one token per row and return the final hidden states.

        Args:
            tokens: Token ids of shape (rows,).
            positions: Position ids of shape (rows,).

        Returns:
            Hidden states of shape (rows, width).
        """
        self.counters.count_decode(len(tokens))
        output = self._decoder(
            inputs_embeds=self._embed(tokens)[None],
            attention_mask=self._no_mask,
            position_ids=positions[None],
            use_cache=False,
            decode_step=decode_step,
        )
        hidden_states: torch.Tensor = output.last_hidden_state[0]
        return hidden_states

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map final hidden states, (rows, width), to the logits of the next token, (rows, vocabulary)."""
        logits: torch.Tensor = self._head(hidden_states)
        return logits
