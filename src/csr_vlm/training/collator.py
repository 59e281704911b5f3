"""Build batches for DPO: prompts encoded as in generation, responses as the token ids that were sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from csr_vlm.core.records import Pair, Prompt
from csr_vlm.models.encoding import batch_rows, image_tensors
from csr_vlm.models.policy import Policy
from csr_vlm.training.packing import attention_window, pack


def training_row(pair: Pair) -> dict[str, Any]:
    """Flatten a pair into a row of the training set."""
    return asdict(pair.prompt) | {
        "chosen_ids": list(pair.chosen.token_ids),
        "rejected_ids": list(pair.rejected.token_ids),
        "ref_chosen_logps": pair.chosen.logprob,
        "ref_rejected_logps": pair.rejected.logprob,
    }


class PairCollator:
    """Build the batch that TRL's DPOTrainer computes on: chosen rows first, then rejected rows.

    Two pairs give four rows. With the prompts ``[1, 9, 5]`` and ``[1, 9, 6, 7]`` (9 stands for the
    image, 0 is padding) the collator turns the rows ::

        [
            {"prompt_id": "a", "image": "a.png", "text": "Why?", "chosen_ids": [20, 21],
             "rejected_ids": [20, 31], "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0},
            {"prompt_id": "b", "image": "b.png", "text": "Why not?", "chosen_ids": [40],
             "rejected_ids": [50, 51], "ref_chosen_logps": -0.5, "ref_rejected_logps": -4.0},
        ]

    into the batch ::

        {
            "input_ids": tensor([[1, 9, 5, 20, 21, 0],
                                 [1, 9, 6, 7, 40, 0],
                                 [1, 9, 5, 20, 31, 0],
                                 [1, 9, 6, 7, 50, 51]]),
            "attention_mask": tensor([[1, 1, 1, 1, 1, 0],
                                      [1, 1, 1, 1, 1, 0],
                                      [1, 1, 1, 1, 1, 0],
                                      [1, 1, 1, 1, 1, 1]]),
            "completion_mask": tensor([[0, 0, 0, 1, 1, 0],
                                       [0, 0, 0, 0, 1, 0],
                                       [0, 0, 0, 1, 1, 0],
                                       [0, 0, 0, 0, 1, 1]]),
            "prompt_ids": ["a", "b"],
            "ref_chosen_logps": tensor([-1.0, -0.5]),
            "ref_rejected_logps": tensor([-2.0, -4.0]),
            "pixel_values": tensor([[1.0], [2.0], [1.0], [2.0]]),
        }

    where ``pixel_values`` stands for all tensors that the processor makes of an image, here of
    shape (1, 1) each; an image is processed once and repeated for both sides. The reference
    log-probabilities are sums over a response, in nats; ``prompt_ids`` serve error messages.

    Args:
        policy: Policy that encodes the prompts.
        packing: Whether to add ``packed``, each pair as one row (see
            :func:`csr_vlm.training.packing.pack`), from which alone the model then computes; it
            holds the image tensors, once per pair. A batch with a row longer than the model's
            attention window is not packed.
    """

    def __init__(self, policy: Policy, *, packing: bool = False) -> None:
        self._policy = policy
        self._packing = packing
        self._window = attention_window(policy.base_model.config)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Build the batch of some rows of the training set."""
        encoded = [self._policy.encode(Prompt(row["prompt_id"], row["image"], row["text"])) for row in rows]
        chosen, rejected = ([row[key] for row in rows] for key in ("chosen_ids", "rejected_ids"))
        both_sides, completions = encoded * 2, chosen + rejected
        batch: dict[str, Any] = dict(batch_rows(both_sides, completions, self._policy.pad_id, "right"))
        del batch["position_ids"]
        batch["completion_mask"] = torch.zeros_like(batch["input_ids"])
        for index, (item, ids) in enumerate(zip(both_sides, completions, strict=True)):
            start = len(item.input_ids)
            batch["completion_mask"][index, start : start + len(ids)] = 1
        batch["prompt_ids"] = [row["prompt_id"] for row in rows]
        for key in ("ref_chosen_logps", "ref_rejected_logps"):
            batch[key] = torch.tensor([row[key] for row in rows])
        width = batch["input_ids"].shape[1]
        if self._packing and (self._window is None or width <= self._window):
            return batch | {"packed": pack(encoded, chosen, rejected, self._policy.pad_id)}
        return batch | image_tensors(both_sides)
