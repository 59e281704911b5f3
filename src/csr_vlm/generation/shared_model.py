"""A policy's model, taken apart for shared attention: read prompts, then step rows."""

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
class PromptRead:
    """What the model keeps of tokens it has read."""

    kv: torch.Tensor
    """Keys and values of shape (layers, 2, key heads, tokens, head size)."""
    hidden: torch.Tensor
    """The last token's final hidden state, of shape (width,)."""
    next_position: int
    """Position of the token that follows; not the number of tokens where images count otherwise."""


class SharedModel:
    """Reads prompts through the whole model, and steps rows through its language model alone."""

    def __init__(self, policy: Policy, counters: Counters) -> None:
        self.policy = policy
        self.counters = counters
        model = policy.base_model
        self._body: Any = model.base_model
        self._decoder: Any = model.get_decoder()
        self._embed: Any = model.get_input_embeddings()
        self._head: Any = model.get_output_embeddings()
        # An attention mask of four dimensions is taken as it stands; ours is never looked at.
        self._no_mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=policy.device)
        shared_attention.install(self._decoder)

    def read(self, encoded: Sequence[EncodedPrompt], prefixes: Sequence[Sequence[int]]) -> list[PromptRead]:
        """Read prompts, each followed by the ids of a partial response."""
        inputs = self.policy.model_inputs(encoded, prefixes, "left")
        cache = DynamicCache()
        output = self._body(**inputs, use_cache=True, past_key_values=cache)
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        self.counters.read(sum(lengths))
        kv = torch.stack([torch.stack([layer.keys, layer.values]) for layer in cache.layers])
        last = output.last_hidden_state[:, -1].clone()
        return [
            PromptRead(kv[:, :, row, :, kv.shape[4] - length :], last[row], length + item.position_delta)
            for row, (length, item) in enumerate(zip(lengths, encoded, strict=True))
        ]

    def step(self, tokens: torch.Tensor, positions: torch.Tensor, step: shared_attention.DecodeStep) -> torch.Tensor:
        """Feed one token a row, (rows,), and return the final hidden states, (rows, width)."""
        self.counters.decode(len(tokens))
        output = self._decoder(
            inputs_embeds=self._embed(tokens)[None],
            attention_mask=self._no_mask,
            position_ids=positions[None],
            use_cache=False,
            shared=step,
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map final hidden states to the logits of the next token."""
        logits: torch.Tensor = self._head(hidden)
        return logits
