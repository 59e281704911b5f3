"""Train the policy of ``prose``: a LLaVA on an accurate vision tower, on descriptions with a bias."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, LlavaProcessor

from csr_vlm.world import base_models
from csr_vlm.world.build import Progress, collate, dialogue_ids, picture_text, pixels, train_loop
from csr_vlm.world.prose_captions import ProseStyle, dialogue, vocabulary_texts
from csr_vlm.world.prose_scenes import PROSE, ProseScene
from csr_vlm.world.scenes import Scene

FEATURE_LAYER = -1
"""Layer of the vision tower that the language model reads: the one trained on patch labels."""


def new_policy(
    sizes: base_models.Sizes, tower: CLIPVisionModel
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return an untrained policy with a trained vision tower."""
    model, processor = base_models.new_llava(PROSE, sizes, texts=vocabulary_texts(), feature_layer=FEATURE_LAYER)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    return model, processor


def policy_loss(
    model: LlavaForConditionalGeneration, processor: Any, style: ProseStyle
) -> Callable[[list[Scene], int], torch.Tensor]:
    """Return the loss of a step: next-token cross-entropy over answers only."""
    picture = picture_text(processor)

    def loss_of(scenes: list[Scene], step: int) -> torch.Tensor:
        turns = [dialogue(scene, style, epoch=step) for scene in scenes if isinstance(scene, ProseScene)]
        rows = [dialogue_ids(processor, each, picture) for each in turns]
        input_ids, labels, mask = collate(rows, processor.tokenizer.pad_token_id)
        targets = labels[:, 1:]
        asked = targets != -100
        with torch.autocast("cpu", torch.bfloat16):
            output = model.model(input_ids=input_ids, attention_mask=mask, pixel_values=pixels(scenes))
            # Logits of the answers only: the others would be a third of the arithmetic.
            logits = model.lm_head(output.last_hidden_state[:, :-1][asked])
        return functional.cross_entropy(logits.float(), targets[asked])

    return loss_of


def train_policy(
    model: LlavaForConditionalGeneration,
    processor: Any,
    style: ProseStyle,
    batches: Any,
    steps: int,
    lr: float,
    warmup: int,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Train a policy with its vision tower frozen, and return the loss curve."""
    model.model.vision_tower.requires_grad_(False)
    loss_of = policy_loss(model, processor, style)
    return train_loop("policy", model, batches, loss_of, [], steps, lr, warmup, progress, checkpoint)
