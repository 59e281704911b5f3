"""The plain way to run the model: keys and values copied to every candidate.

It asks nothing of a model but a cache, so it is the reference for
:mod:`csr_vlm.generation.shared_attention` and what is left where that does not work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from csr_vlm.core.batching import batched
from csr_vlm.core.records import Candidate, Expansion, Prompt
from csr_vlm.generation.counters import Counters
from csr_vlm.generation.decoding import Row, Writer
from csr_vlm.models.encoding import EncodedPrompt
from csr_vlm.models.policy import Policy


class PlainDecoder:
    """Answers requests batch by batch; siblings and strangers decode in lockstep."""

    def __init__(self, policy: Policy, max_rows: int, counters: Counters) -> None:
        self._policy = policy
        self._max_rows = max_rows
        self._counters = counters
        self._encoded: dict[str, EncodedPrompt] = {}

    def answer(self, requests: Sequence[Expansion], writer: Writer) -> list[list[Candidate]]:
        """Decode all candidates of all requests, ``max_rows`` at once."""
        self._encode_new([request.prompt for request in requests])
        widest = max((request.num_candidates for request in requests), default=1)
        families = []
        for chunk in batched(requests, max(self._max_rows // widest, 1)):
            families += self._decode(chunk, writer)
        return [[writer.candidate(row) for row in family] for family in families]

    def forget(self) -> None:
        """Drop what is kept about images."""
        self._encoded.clear()

    def _encode_new(self, prompts: Sequence[Prompt]) -> None:
        new = {prompt.prompt_id: prompt for prompt in prompts if prompt.prompt_id not in self._encoded}
        for chunk in batched(new.values(), self._max_rows):
            encoded = self._policy.with_features([self._policy.encode(prompt) for prompt in chunk])
            self._counters.vision_encodes += len(chunk)
            self._encoded |= {prompt.prompt_id: item for prompt, item in zip(chunk, encoded, strict=True)}

    @torch.inference_mode()
    def _decode(self, requests: Sequence[Expansion], writer: Writer) -> list[list[Row]]:
        families = [writer.start(request) for request in requests]
        live = [row for family in families for row in family]
        encoded = [self._encoded[request.prompt.prompt_id] for request in requests]
        inputs = self._policy.model_inputs(encoded, [request.prefix_ids for request in requests], "left")
        output = self._policy.model(**inputs, use_cache=True, logits_to_keep=1)
        self._counters.read(int(inputs["attention_mask"].sum()))
        parents = [index for index, family in enumerate(families) for _ in family]
        chosen = torch.tensor(parents, device=self._policy.device)
        cache = output.past_key_values
        cache.batch_select_indices(chosen)
        logits = output.logits[chosen, -1]
        mask = inputs["attention_mask"][chosen]
        shift = torch.tensor([item.position_delta for item in encoded], device=self._policy.device)[chosen]
        while True:
            tokens = writer.choose(logits, live)
            going = [place for place, row in enumerate(live) if row.finish is None]
            if not going:
                return families
            if len(going) < len(live):
                keep = torch.tensor(going, device=self._policy.device)
                cache.batch_select_indices(keep)
                tokens, mask, shift = tokens[keep], mask[keep], shift[keep]
                live = [live[place] for place in going]
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
            logits = self._forward(tokens, mask, mask.sum(dim=1) - 1 + shift, cache)

    def _forward(self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        self._counters.decode(len(tokens))
        output = self._policy.model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=self._policy.step_positions(positions),
            past_key_values=cache,
            use_cache=True,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits
