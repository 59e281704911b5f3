"""Train with stock TRL, for comparison: one row per response, each with its own copy of image and prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import default_data_collator
from trl import DPOConfig, DPOTrainer

from csr_vlm.core.records import Pair
from csr_vlm.models.encoding import batch_rows, image_tensors
from csr_vlm.models.policy import Policy


def stock_batch(policy: Policy, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Build the batch that TRL computes on: chosen rows first, then rejected rows."""
    encoded = [policy.encode(pair.prompt) for pair in pairs] * 2
    sides = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    completions = [response.token_ids for side in sides for response in side]
    batch: dict[str, Any] = dict(batch_rows(encoded, completions, policy.pad_id, "right"))
    del batch["position_ids"]
    batch["completion_mask"] = torch.zeros_like(batch["input_ids"])
    for index, (item, ids) in enumerate(zip(encoded, completions, strict=True)):
        start = len(item.input_ids)
        batch["completion_mask"][index, start : start + len(ids)] = 1
    for key, side in zip(("ref_chosen_logps", "ref_rejected_logps"), sides, strict=True):
        batch[key] = torch.tensor([response.logprob for response in side])
    return batch | image_tensors(encoded)


def stock_trainer(policy: Policy, args: DPOConfig) -> DPOTrainer:
    """Create TRL's trainer; its loss is computed on :func:`stock_batch`."""
    dataset = Dataset.from_dict({"image": [None]})
    return DPOTrainer(
        model=policy.model,
        args=args,
        train_dataset=dataset,
        data_collator=default_data_collator,
        processing_class=policy.processor,
    )
