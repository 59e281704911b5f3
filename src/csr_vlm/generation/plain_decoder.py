"""Decode with an ordinary key/value cache that is copied to every candidate.

This needs nothing of a model but a cache, so it is the baseline that
:mod:`csr_vlm.generation.shared_attention` is checked against, and the fallback where shared
attention does not work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from csr_vlm.core.batching import batched
from csr_vlm.core.records import Candidate, Expansion, Prompt
from csr_vlm.generation.counters import Counters
from csr_vlm.generation.decoding import PartialCandidate, TokenSampler
from csr_vlm.models.encoding import EncodedPrompt
from csr_vlm.models.policy import Policy


class PlainDecoder:
    """Answer requests batch by batch; all rows of a batch decode in lockstep.

    Args:
        counters: Counters that the decoder's work is added to.
    """

    def __init__(self, policy: Policy, counters: Counters) -> None:
        self._policy = policy
        self._counters = counters
        self._encoded: dict[str, EncodedPrompt] = {}

    def answer(self, requests: Sequence[Expansion], sampler: TokenSampler, max_rows: int) -> list[list[Candidate]]:
        """Decode all candidates of all requests, ``max_rows`` at once.

        Returns:
            The candidates of each request, in the order of the requests.
        """
        self._encode_new([request.prompt for request in requests], max_rows)
        most_candidates = max((request.num_candidates for request in requests), default=1)
        sibling_groups = []
        for chunk in batched(requests, max(max_rows // most_candidates, 1)):
            sibling_groups += self._decode(chunk, sampler)
        return [[sampler.completed(candidate) for candidate in group] for group in sibling_groups]

    def forget(self) -> None:
        """Drop the encoded prompts."""
        self._encoded.clear()

    def _encode_new(self, prompts: Sequence[Prompt], batch_size: int) -> None:
        new = {prompt.prompt_id: prompt for prompt in prompts if prompt.prompt_id not in self._encoded}
        for chunk in batched(new.values(), batch_size):
            encoded = self._policy.with_features([self._policy.encode(prompt) for prompt in chunk])
            self._counters.vision_encodes += len(chunk)
            self._encoded |= {prompt.prompt_id: item for prompt, item in zip(chunk, encoded, strict=True)}

    @torch.inference_mode()
    def _decode(self, requests: Sequence[Expansion], sampler: TokenSampler) -> list[list[PartialCandidate]]:
        sibling_groups = [sampler.start(request) for request in requests]
        live = [candidate for group in sibling_groups for candidate in group]
        encoded = [self._encoded[request.prompt.prompt_id] for request in requests]
        inputs = self._policy.model_inputs(encoded, [request.prefix_ids for request in requests], "left")
        output = self._policy.model(**inputs, use_cache=True, logits_to_keep=1)
        self._counters.count_prefill(int(inputs["attention_mask"].sum()))
        # Repeat each request's row for all its candidates.
        request_of_row = torch.tensor(
            [index for index, group in enumerate(sibling_groups) for _ in group], device=self._policy.device
        )
        cache = output.past_key_values
        cache.batch_select_indices(request_of_row)
        logits = output.logits[request_of_row, -1]  # (rows, vocabulary)
        mask = inputs["attention_mask"][request_of_row]  # (rows, tokens)
        shift = torch.tensor([item.position_delta for item in encoded], device=self._policy.device)[
            request_of_row
        ]  # (rows,)
        while True:
            tokens = sampler.choose(logits, live)  # (rows,)
            unfinished = [row for row, candidate in enumerate(live) if candidate.finish is None]
            if not unfinished:
                return sibling_groups
            if len(unfinished) < len(live):
                kept_rows = torch.tensor(unfinished, device=self._policy.device)
                cache.batch_select_indices(kept_rows)
                tokens, mask, shift = tokens[kept_rows], mask[kept_rows], shift[kept_rows]
                live = [live[row] for row in unfinished]
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
            logits = self._forward(tokens, mask, mask.sum(dim=1) - 1 + shift, cache)

    def _forward(self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """Feed one token per row, (rows,), and return the logits of the next, (rows, vocabulary)."""
        self._counters.count_decode(len(tokens))
        output = self._policy.model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=self._policy.step_positions(positions),
            past_key_values=cache,
            use_cache=True,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits
