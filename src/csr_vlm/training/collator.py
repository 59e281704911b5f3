"""Batches for DPO: the prompt as generation encoded it, the response ids as sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from csr_vlm.core.records import Pair, Prompt
from csr_vlm.models.encoding import batch_rows, image_tensors
from csr_vlm.models.policy import Policy
from csr_vlm.training.packing import pack, window


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
        prompt_ids                                   two names, for errors

    ``completion_mask`` is 1 exactly on the response's ids. Each image is processed once.

    Args:
        policy: Encodes the prompts.
        packing: Also lay out each pair as one row (see :mod:`csr_vlm.training.packing`), under
            ``packed``; the pictures are then there, once a pair, and the model reads nothing
            else. A batch with a row beyond the model's attention window stays as it is.
    """

    def __init__(self, policy: Policy, *, packing: bool = False) -> None:
        self._policy = policy
        self._packing = packing
        self._window = window(policy.base_model.config)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        once = [self._policy.encode(Prompt(row["prompt_id"], row["image"], row["text"])) for row in rows]
        chosen, rejected = ([row[key] for row in rows] for key in ("chosen_ids", "rejected_ids"))
        encoded, completions = once * 2, chosen + rejected
        batch: dict[str, Any] = dict(batch_rows(encoded, completions, self._policy.pad_id, "right"))
        del batch["position_ids"]
        batch["completion_mask"] = torch.zeros_like(batch["input_ids"])
        for index, (item, ids) in enumerate(zip(encoded, completions, strict=True)):
            start = len(item.input_ids)
            batch["completion_mask"][index, start : start + len(ids)] = 1
        batch["prompt_ids"] = [row["prompt_id"] for row in rows]
        for key in ("ref_chosen_logps", "ref_rejected_logps"):
            batch[key] = torch.tensor([row[key] for row in rows])
        width = batch["input_ids"].shape[1]
        if self._packing and (self._window is None or width <= self._window):
            return batch | {"packed": pack(once, chosen, rejected, self._policy.pad_id)}
        return batch | image_tensors(encoded)
