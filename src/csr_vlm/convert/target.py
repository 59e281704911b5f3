"""The transformers side: configuration, tokenizer and processor, made from the original's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
)

from csr_vlm.convert.layouts import ACTIVATIONS, STRATEGIES, VICUNA_V1, disk_name
from csr_vlm.convert.source import Original
from csr_vlm.core.errors import CsrError

IMAGE, PAD = "<image>", "<pad>"
_MULTIPLE = 64
"""Rows of grown embeddings are padded to a multiple that GPUs like."""


@dataclass(frozen=True)
class Target:
    """What is written beside the weights, and what the weights must be."""

    config: LlavaConfig
    generation: GenerationConfig
    processor: Any
    shapes: dict[str, torch.Size]
    """Of every tensor, by its name on disk."""


def make_target(original: Original) -> Target:
    """Build the configuration, the processor and the list of expected tensors.

    The tokenizer gets ``<image>`` and ``<pad>`` where it has none; the embeddings grow to
    hold them, to a multiple of 64 rows.

    Raises:
        CsrError: The vision tower or the tokenizer cannot be read.
    """
    vision = _vision_config(original.vision)
    tokenizer = _tokenizer(original.tokenizer)
    rows = original.config["vocab_size"]
    if len(tokenizer) > rows:
        rows = -(-len(tokenizer) // _MULTIPLE) * _MULTIPLE
    text = _text_config(original, rows, tokenizer.pad_token_id)
    strategy = STRATEGIES[original.config.get("mm_vision_select_feature", "patch")]
    if vision.model_type == "siglip_vision_model":
        # SigLIP has no class token to leave out.
        vision.vision_use_head = False
        strategy = "full"
    has_class_token = vision.model_type == "clip_vision_model"
    patches = (vision.image_size // vision.patch_size) ** 2
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=patches + (strategy == "full" and has_class_token),
        projector_hidden_act=ACTIVATIONS[original.projector],
        vision_feature_select_strategy=strategy,
        vision_feature_layer=original.config.get("mm_vision_select_layer", -2),
        tie_word_embeddings=text.tie_word_embeddings,
    )
    processor = LlavaProcessor(
        image_processor=_image_processor(original),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(has_class_token),
        chat_template=VICUNA_V1.replace("GAP", gap_after_image(tokenizer) or ""),
    )
    ids = {f"{name}_token_id": getattr(text, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return Target(config, GenerationConfig(**ids), processor, _shapes(config))


def _shapes(config: LlavaConfig) -> dict[str, torch.Size]:
    """List the tensors of the model that the configuration describes; no weight is made."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    shapes = {disk_name(name): tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[disk_name("lm_head.weight")]
    return shapes


def _text_config(original: Original, rows: int, pad: int) -> LlamaConfig:
    known = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"}
    about_the_file = {"architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path"}
    settings = {key: value for key, value in original.config.items() if key in known - about_the_file}
    # A checkpoint with output weights of its own means them, whatever its configuration says.
    tied = bool(settings.get("tie_word_embeddings")) and "lm_head.weight" not in original.tensors
    return LlamaConfig(**settings | {"vocab_size": rows, "pad_token_id": pad, "tie_word_embeddings": tied})


def _vision_config(where: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(where)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CsrError(
            f"the vision tower {where} cannot be read: {reason}", "name a directory or hub id: --vision"
        ) from None
    config = getattr(config, "vision_config", config)
    if config.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise CsrError(f"the vision tower {where} is a {config.model_type}", "it must be of CLIP or SigLIP")
    return config


def _tokenizer(where: str) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            where, extra_special_tokens={"image_token": IMAGE}, padding_side="left"
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CsrError(
            f"the tokenizer of {where} cannot be read: {reason}",
            "a tokenizer.model alone needs: pip install sentencepiece protobuf",
        ) from None
    tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer


def gap_after_image(tokenizer: Any) -> str | None:
    """Find what must stand between an image and its question to get LLaVA's tokens; None if nothing does.

    LLaVA tokenises the text after an image by itself, so a tokenizer that puts a space
    before every text puts one there; in transformers that text is no beginning, and some
    versions of the tokenizer leave the space out.
    """
    text = "\nWhat is this?"
    alone = tokenizer(text, add_special_tokens=False)["input_ids"]
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    for gap in ("", " "):
        ids = tokenizer(f"{IMAGE}{gap}{text}", add_special_tokens=False)["input_ids"]
        if ids[ids.index(image) + 1 :] == alone:
            return gap
    return None


def _image_processor(original: Original) -> Any:
    """Make square pictures as the original does: padded, stretched, or the middle cut out."""
    try:
        found = AutoImageProcessor.from_pretrained(original.vision)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CsrError(
            f"{original.vision} has no image processor: {reason}", "it needs preprocessor_config.json"
        ) from None
    aspect = original.config.get("image_aspect_ratio")
    side = dict(found.crop_size or found.size)
    if aspect == "pad":
        look = {name: getattr(found, name) for name in ("image_mean", "image_std", "resample", "rescale_factor")}
        side = {key: value for key, value in side.items() if key in ("height", "width")}
        return LlavaImageProcessor(do_pad=True, size=side, crop_size=side, **look)
    if aspect == "resize":
        found.size, found.do_center_crop = found.crop_size or found.size, False
    return found
