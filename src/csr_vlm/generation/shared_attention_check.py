"""Check on one prompt that shared attention computes what the model computes.

Whether a model's attention can be replaced, how it numbers positions and whether all its layers
attend to all tokens cannot be read off its class, so it is measured:

- Two sentences of three tokens each (the last six tokens of the prompt that are neither image
  nor end-of-response tokens) are fed through :class:`csr_vlm.generation.scheduler.Scheduler`, the
  second as a continuation of the first. Each has a sibling, which writes the second sentence.
- The prompt and the same six tokens go through one ordinary forward pass without a cache.
- Compared are the next-token log-probabilities (nats) at seven steps: before each of the six
  tokens and after the last. Per step this takes the mean of |shared - ordinary| over the likely
  tokens of the vocabulary, those within 15 nats of the most probable one. The largest of the
  seven means must not exceed :data:`TOLERANCE`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from csr_vlm.core.records import Candidate, Expansion, Finish, Prompt
from csr_vlm.generation.counters import Counters
from csr_vlm.generation.decoding import PartialCandidate
from csr_vlm.generation.scheduler import Scheduler
from csr_vlm.generation.shared_model import SharedModel
from csr_vlm.models.policy import Policy

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Largest allowed difference, in nats, by the model's dtype: the maximum over steps of the mean
over likely tokens; 1e-3 for other dtypes."""
_LIKELY = 15.0
"""Tokens further below the most probable one, in nats, are not compared."""


class _ForcedSampler:
    """Write given sentences, and record the log-probabilities at each step."""

    def __init__(self, sentences: Sequence[Sequence[int]], sibling_tokens: Sequence[int]) -> None:
        self._sentences = iter(sentences)
        self._sibling_tokens = list(sibling_tokens)
        self._current: list[int] = []
        self.logprobs: list[torch.Tensor] = []
        """Log-probabilities that the first sibling's tokens were chosen from, each of shape (vocabulary,)."""

    def start(self, request: Expansion) -> list[PartialCandidate]:
        self._current = list(next(self._sentences))
        return [PartialCandidate(0, index, request.prefix_ids, np.empty(0)) for index in range(request.num_candidates)]

    def choose(self, logits: torch.Tensor, candidates: Sequence[PartialCandidate]) -> torch.Tensor:
        """Continue the first sibling with the sentence, the others with other tokens."""
        self.logprobs.append(torch.log_softmax(logits[0].float(), dim=-1))
        step = len(candidates[0].token_ids)
        tokens = []
        for candidate in candidates:
            if step == len(self._current):
                candidate.finish = Finish.DELIMITER
                tokens.append(0)
            else:
                tokens.append((self._sibling_tokens if candidate.sibling_index else self._current)[step])
                candidate.token_ids.append(tokens[-1])
        return torch.tensor(tokens, device=logits.device)

    def completed(self, candidate: PartialCandidate) -> Candidate:
        return Candidate(tuple(candidate.token_ids), (), "", Finish.DELIMITER)


def shared_attention_problem(policy: Policy, prompt: Prompt) -> str | None:
    """Return why a policy cannot decode with shared attention, or None if the check passes."""
    try:
        difference = _difference(policy, prompt)
    except Exception as error:  # A model of an unknown family may fail anywhere in its own code.
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    limit = TOLERANCE.get(policy.base_model.dtype, 1e-3)
    # Written so that not-a-number fails too.
    if not difference <= limit:
        return f"log-probabilities differ by {difference:.3g} nats; at most {limit} is allowed"
    return None


@torch.inference_mode()
def _difference(policy: Policy, prompt: Prompt) -> float:
    """Return the difference that the module's docstring defines, in nats."""
    encoded = policy.with_features([policy.encode(prompt)])
    special_ids = {*policy.image_token_ids, *policy.eos_ids}
    ordinary = [token for token in encoded[0].input_ids.tolist() if token not in special_ids]
    first, second = ordinary[-6:-3], ordinary[-3:]
    sampler = _ForcedSampler([first, second], sibling_tokens=second)
    scheduler = Scheduler(SharedModel(policy, Counters()), sampler, max_rows=2, max_prompts=1)
    scheduler.submit([Expansion(prompt, "", (), 2, ())])
    scheduler.collect()
    scheduler.submit([Expansion(prompt, "0", tuple(first), 2, ())])
    scheduler.collect()
    # The end of the first sentence is recorded twice: for that sentence and for its continuation.
    shared_logprobs = torch.stack([*sampler.logprobs[: len(first)], *sampler.logprobs[len(first) + 1 :]])
    inputs = policy.model_inputs(encoded, [[*first, *second]], "right")
    logits = policy.model(**inputs, use_cache=False, logits_to_keep=len(shared_logprobs)).logits[0]
    ordinary_logprobs = torch.log_softmax(logits.float(), dim=-1)  # (steps, vocabulary)
    is_likely = ordinary_logprobs > ordinary_logprobs.amax(dim=-1, keepdim=True) - _LIKELY
    absolute = (shared_logprobs - ordinary_logprobs).abs() * is_likely
    return float(absolute.sum(dim=-1).div(is_likely.sum(dim=-1)).max())
