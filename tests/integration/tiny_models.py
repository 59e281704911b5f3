"""Write checkpoints with a few thousand random weights in the real formats."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Processor,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
)

from csr_vlm.world.base_models import Sizes, fast_tokenizer, new_clip, train_tokenizer
from csr_vlm.world.scenes import HARBOUR

SMALL = Sizes(
    vision_width=16,
    vision_layers=2,
    text_width=16,
    text_layers=2,
    language_width=16,
    language_layers=2,
    heads=2,
)
_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def write_clip(directory: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model, processor = new_clip(HARBOUR, SMALL)
    return _write(model, processor, directory)


def write_siglip(directory: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = fast_tokenizer(train_tokenizer(HARBOUR, lowercase=False))
    config = SiglipConfig(
        text_config={**_TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "projection_size": 16},
        vision_config={**_TOWER, "image_size": 48, "patch_size": 12},
    )
    processor = SiglipProcessor(SiglipImageProcessorPil(size={"height": 48, "width": 48}), tokenizer)
    return _write(SiglipModel(config), processor, directory)


def write_naflex(directory: Path) -> Path:
    """Write a SigLIP 2 that accepts images of any shape."""
    torch.manual_seed(0)
    tokenizer = fast_tokenizer(train_tokenizer(HARBOUR, lowercase=False))
    config = Siglip2Config(
        text_config={**_TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "projection_size": 16},
        vision_config={**_TOWER, "num_patches": 16, "patch_size": 12},
    )
    images = Siglip2ImageProcessorPil(patch_size=12, max_num_patches=16)
    return _write(Siglip2Model(config), Siglip2Processor(images, tokenizer), directory)


def _write(model: torch.nn.Module, processor: object, directory: Path) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            # With the default initialization outputs are nearly equal for all inputs, and a wrong tower would not show.
            parameter.normal_(0.0, 0.3)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory
