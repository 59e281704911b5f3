"""Train the vision tower of ``prose`` on patch labels, before the policy uses it.

A linear head on every patch (kind, color and offset to the center of the object) makes the tower
accurate within minutes; the head is removed afterwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionModel

from csr_vlm.world import base_models
from csr_vlm.world.build import Progress, pixels, train_loop
from csr_vlm.world.prose_scenes import COLORS, NUM_CELLS, PROSE, SIDE, PlacedObject, ProseScene
from csr_vlm.world.scenes import CELL, Scene

PATCHES = SIDE // base_models.PATCH_SIZE
"""Patches along a side of the picture."""
_PER_CELL = CELL // base_models.PATCH_SIZE


class SeeingTower(nn.Module):
    """Add a linear head on every patch of a CLIP vision tower's last layer."""

    def __init__(self, sizes: base_models.Sizes) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(base_models.vision_config(sizes, SIDE))
        self.head = nn.Linear(sizes.vision_width, 1 + len(PROSE.kinds) + len(COLORS) + 2)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Predict, for pictures of shape (n, 3, side, side), kind, color and offset of every patch.

        Returns:
            Logits of shape (n, patches, 1 + kinds), kind 0 being nothing, logits of shape
            (n, patches, colors), and offsets of shape (n, patches, 2) in patches.
        """
        hidden = self.tower(images, output_hidden_states=True).hidden_states[-1][:, 1:]
        return self.head(hidden).split([1 + len(PROSE.kinds), len(COLORS), 2], dim=-1)  # type: ignore[no-any-return]


def patch_labels(scene: ProseScene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Label every patch with the object in its block of cells.

    Returns:
        Kinds of shape (patches,), 0 for nothing and the index in ``PROSE.kinds`` plus 1 otherwise;
        colors of shape (patches,), -100 for nothing; offsets from the middle of the patch to the
        middle of the object, of shape (patches, 2), in patches.
    """
    kinds = np.zeros((PATCHES, PATCHES), dtype=np.int64)
    colors = np.full((PATCHES, PATCHES), -100, dtype=np.int64)
    offsets = np.zeros((PATCHES, PATCHES, 2), dtype=np.float32)
    for item in scene.objects:
        assert isinstance(item, PlacedObject)
        row, column = (_PER_CELL * at for at in divmod(item.cell, NUM_CELLS))
        reach = _PER_CELL * item.span
        rows, columns = slice(row, row + reach), slice(column, column + reach)
        kinds[rows, columns] = 1 + PROSE.kinds.index(item.kind)
        colors[rows, columns] = COLORS.index(item.color)
        at = np.indices((PATCHES, PATCHES))[:, rows, columns] + 0.5
        offsets[rows, columns, 0] = item.center[0] * PATCHES - at[1]
        offsets[rows, columns, 1] = item.center[1] * PATCHES - at[0]
    return kinds.ravel(), colors.ravel(), offsets.reshape(-1, 2)


def vision_loss(model: SeeingTower, scenes: list[Scene]) -> torch.Tensor:
    """Return the sum of the cross-entropies of kinds and colors and the squared error of offsets (weight 0.1)."""
    kinds, colors, offsets = (
        torch.from_numpy(np.stack(part))
        for part in zip(*(patch_labels(scene) for scene in scenes if isinstance(scene, ProseScene)), strict=True)
    )
    kind_logits, color_logits, predicted = model(pixels(scenes))
    kind_loss = functional.cross_entropy(kind_logits.flatten(0, 1), kinds.flatten())
    color_loss = functional.cross_entropy(color_logits.flatten(0, 1), colors.flatten())
    there = (kinds > 0).unsqueeze(-1)
    offset_loss = ((predicted - offsets).square() * there).sum() / there.sum().clamp(min=1)
    return kind_loss + color_loss + 0.1 * offset_loss


def train_vision(
    sizes: base_models.Sizes,
    batches: Any,
    steps: int,
    lr: float,
    warmup: int,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
) -> tuple[CLIPVisionModel, dict[str, Any]]:
    """Train a tower and return it without its head, with the loss curve."""
    model = SeeingTower(sizes)
    log = train_loop(
        "vision tower", model, batches, lambda scenes, step: vision_loss(model, scenes), [], steps, lr, warmup,
        progress, checkpoint,
    )  # fmt: skip
    return model.tower, log
