"""Batches for DPO: the prompt as generation encoded it, the response ids as sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from csr_vlm.generation.policy import Policy, batch_rows, image_tensors
from csr_vlm.records import Pair, Prompt


def training_row(pair: Pair) -> dict[str, Any]:
    """Flatten a pair into a row of the training set."""
    return asdict(pair.prompt) | {
        "chosen_ids": list(pair.chosen.token_ids),
        "rejected_ids": list(pair.rejected.token_ids),
        "ref_chosen_logps": pair.chosen.logprob,
        "ref_rejected_logps": pair.rejected.logprob,
    }


class PairCollator:
    """Makes the batch that TRL's DPOTrainer computes on: chosen rows first, then rejected.

    For two pairs it returns tensors with four rows::

        input_ids, attention_mask, completion_mask   (4, width), padded on the right
        pixel_values                                 (4, 3, height, width)
        ref_chosen_logps, ref_rejected_logps         (2,), nats, from the ledger

    ``completion_mask`` is 1 exactly on the response's ids. Each image is processed once.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        encoded = [self._policy.encode(Prompt(row["prompt_id"], row["image"], row["text"])) for row in rows] * 2
        completions = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
        batch = batch_rows(encoded, completions, self._policy.pad_id, "right")
        del batch["position_ids"]
        completion_mask = torch.zeros_like(batch["input_ids"])
        for index, (item, ids) in enumerate(zip(encoded, completions, strict=True)):
            start = len(item.input_ids)
            completion_mask[index, start : start + len(ids)] = 1
        references = {
            key: torch.tensor([row[key] for row in rows]) for key in ("ref_chosen_logps", "ref_rejected_logps")
        }
        return batch | image_tensors(encoded) | references | {"completion_mask": completion_mask}
