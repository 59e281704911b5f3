"""Create LLaVA-like policies with random weights in several sizes, and images for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from csr_vlm.core.records import Prompt
from csr_vlm.models.policy import Policy
from csr_vlm.world.base_models import CHAT_TEMPLATE, SPECIAL, fast_tokenizer, train_tokenizer
from csr_vlm.world.scenes import HARBOUR

PAD, BOS, _, EOS, IMAGE = range(5)


@dataclass(frozen=True)
class Size:
    """Configure the shape of a model."""

    width: int
    layers: int
    heads: int
    inner: int
    vocabulary: int
    image: int
    """Side of the image in pixels."""
    patch: int
    vision_width: int
    vision_layers: int


SIZES = {
    # A language model of 3.3 million parameters behind 64 image tokens.
    "tiny": Size(256, 4, 4, 720, 768, 96, 12, 128, 4),
    # 162 million parameters behind 576 image tokens.
    "mid": Size(768, 12, 12, 3072, 32_000, 336, 14, 384, 6),
    # LLaVA-1.5-7B: Vicuna-7B behind CLIP ViT-L/14 at 336 pixels.
    "7b": Size(4096, 32, 32, 11_008, 32_064, 336, 14, 1024, 24),
}


def make_policy(size: Size, dtype: torch.dtype, device: str = "cpu") -> Policy:
    """Create a policy with random weights, initialized on the device."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=4 * size.vision_width,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_width // 64,
        image_size=size.image,
        patch_size=size.patch,
    )
    text = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=4096,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=IMAGE,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=(size.image // size.patch) ** 2,
        dtype=dtype,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    return Policy(model, _processor(size))


def _processor(size: Size) -> LlavaProcessor:
    tokenizer = fast_tokenizer(
        train_tokenizer(HARBOUR, lowercase=False), extra_special_tokens={"image_token": SPECIAL[IMAGE]}
    )
    side = {"height": size.image, "width": size.image}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": size.image}, crop_size=side),
        tokenizer=tokenizer,
        patch_size=size.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_prompts(
    directory: Path, number: int, side: int, first: int = 0, num_images: int | None = None
) -> list[Prompt]:
    """Write images of random noise and return a prompt about each.

    Args:
        number: Number of prompts.
        side: Side of the images in pixels.
        first: Index of the first prompt.
        num_images: Number of different images; one per prompt by default.
    """
    prompts = []
    for index in range(first, first + number):
        image_index = index % (num_images or first + number)
        path = directory / f"{image_index}.png"
        if not path.exists():
            noise = np.random.default_rng(image_index).integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
        prompts.append(Prompt(f"p{index}", str(path), "Describe the image."))
    return prompts
