"""Does shared attention give what the model gives? Tried on one prompt before it is trusted.

Whether a model's attention can be replaced, whether it numbers positions as others do and
whether its layers look at all tokens cannot be read off its class. So two short sentences
are fed through the scheduler, the second continuing the first, and compared with a plain
forward pass over the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from csr_vlm.core.records import Candidate, Expansion, Finish, Prompt
from csr_vlm.generation.counters import Counters
from csr_vlm.generation.decoding import Row
from csr_vlm.generation.scheduler import Scheduler
from csr_vlm.generation.shared_model import SharedModel
from csr_vlm.models.policy import Policy

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Largest mean difference of log-probabilities at any token, in nats."""


class _Forced:
    """Writes given sentences and notes the log-probabilities that it saw."""

    def __init__(self, sentences: Sequence[Sequence[int]], others: Sequence[int]) -> None:
        self._sentences = iter(sentences)
        self._others = list(others)
        self._current: list[int] = []
        self.seen: list[torch.Tensor] = []

    def start(self, request: Expansion) -> list[Row]:
        self._current = list(next(self._sentences))
        return [Row(0, place, request.prefix_ids, np.empty(0)) for place in range(request.num_candidates)]

    def choose(self, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        """Continue the first sibling by the sentence, the others by something else."""
        self.seen.append(torch.log_softmax(logits[0].float(), dim=-1))
        step = len(rows[0].ids)
        tokens = []
        for row in rows:
            if step == len(self._current):
                row.finish = Finish.DELIMITER
                tokens.append(0)
            else:
                tokens.append((self._others if row.place else self._current)[step])
                row.ids.append(tokens[-1])
        return torch.tensor(tokens, device=logits.device)

    def candidate(self, row: Row) -> Candidate:
        return Candidate(tuple(row.ids), (), "", Finish.DELIMITER)


def sharing_trouble(policy: Policy, prompt: Prompt) -> str | None:
    """Say what is wrong with decoding this model by shared attention; None if nothing is."""
    try:
        difference = _difference(policy, prompt)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    limit = TOLERANCE.get(policy.base_model.dtype, 1e-3)
    if not difference <= limit:
        return f"log-probabilities differ by {difference:.3g} nats"
    return None


@torch.inference_mode()
def _difference(policy: Policy, prompt: Prompt) -> float:
    encoded = policy.with_features([policy.encode(prompt)])
    barred = {*policy.image_token_ids, *policy.eos_ids}
    words = [token for token in encoded[0].input_ids.tolist() if token not in barred]
    first, second = words[-6:-3], words[-3:]
    writer = _Forced([first, second], others=second)
    scheduler = Scheduler(SharedModel(policy, Counters()), writer, max_rows=2, max_prompts=1)
    scheduler.submit([Expansion(prompt, "", (), 2, ())])
    scheduler.collect()
    scheduler.submit([Expansion(prompt, "0", tuple(first), 2, ())])
    scheduler.collect()
    # The end of the first sentence is seen twice: by the sentence and by its successor.
    shared = torch.stack([*writer.seen[: len(first)], *writer.seen[len(first) + 1 :]])
    inputs = policy.model_inputs(encoded, [[*first, *second]], "right")
    logits = policy.model(**inputs, use_cache=False).logits[0, -len(shared) :]
    plain = torch.log_softmax(logits.float(), dim=-1)
    likely = plain > plain.amax(dim=-1, keepdim=True) - 15
    return float(((shared - plain).abs() * likely).sum(dim=-1).div(likely.sum(dim=-1)).max())
