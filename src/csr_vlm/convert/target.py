"""Build the transformers configuration, tokenizer and processor from the original's settings."""

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
from csr_vlm.core.errors import CsrError, reason_of

IMAGE, PAD = "<image>", "<pad>"
_ROW_MULTIPLE = 64
"""Multiple to which the rows of extended embeddings are padded, for efficient matrix products on GPUs."""


@dataclass(frozen=True)
class Target:
    """Hold everything that is written besides the weights, and the expected shapes of the weights."""

    config: LlavaConfig
    generation: GenerationConfig
    processor: Any
    shapes: dict[str, torch.Size]
    """Shape of every tensor, by its name on disk."""


def make_target(original: Original) -> Target:
    """Build the configuration, the processor and the list of expected tensors.

    ``<image>`` and ``<pad>`` are added to the tokenizer if it lacks them; the embeddings are then
    extended to a multiple of 64 rows.

    Raises:
        CsrError: The vision tower or the tokenizer cannot be read.
    """
    vision = _vision_config(original.vision)
    tokenizer = _tokenizer(original.tokenizer)
    rows = original.config["vocab_size"]
    if len(tokenizer) > rows:
        rows = -(-len(tokenizer) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    text = _text_config(original, rows, tokenizer.pad_token_id)
    strategy = STRATEGIES[original.config.get("mm_vision_select_feature", "patch")]
    if vision.model_type == "siglip_vision_model":
        # SigLIP has no class token to skip.
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
    """Return the shapes of the model's tensors without creating its weights."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    shapes = {disk_name(name): tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[disk_name("lm_head.weight")]
    return shapes


def _text_config(original: Original, rows: int, pad: int) -> LlamaConfig:
    known = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"}
    file_options = {"architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path"}
    settings = {key: value for key, value in original.config.items() if key in known - file_options}
    # A checkpoint with separate output weights uses them, even if its configuration says that they are tied.
    tied = bool(settings.get("tie_word_embeddings")) and "lm_head.weight" not in original.tensors
    return LlamaConfig(**settings | {"vocab_size": rows, "pad_token_id": pad, "tie_word_embeddings": tied})


def _vision_config(where: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise CsrError(
            f"the vision tower {where} cannot be read: {reason_of(error)}", "set --vision to a directory or a hub id"
        ) from None
    config = getattr(config, "vision_config", config)
    if config.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise CsrError(f"the vision tower {where} has type {config.model_type}", "it must be CLIP or SigLIP")
    return config


def _tokenizer(where: str) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            where, extra_special_tokens={"image_token": IMAGE}, padding_side="left"
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise CsrError(
            f"the tokenizer of {where} cannot be read: {reason_of(error)}",
            "if it has tokenizer.model only: pip install sentencepiece protobuf",
        ) from None
    tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer


def gap_after_image(tokenizer: Any) -> str | None:
    """Return the text between an image and its question that gives LLaVA's tokens; None if neither option does.

    LLaVA tokenizes the text after an image separately, so a tokenizer that prepends a space to every
    text prepends one there. In transformers it is in the middle of a text, where some versions of
    the tokenizer prepend none, so the template must contain the space.
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
    """Build an image processor that makes square images as the original does: padded, stretched or center-cropped."""
    try:
        image_processor = AutoImageProcessor.from_pretrained(original.vision)
    except (OSError, ValueError, KeyError) as error:
        raise CsrError(
            f"{original.vision} has no image processor: {reason_of(error)}", "it must contain preprocessor_config.json"
        ) from None
    aspect = original.config.get("image_aspect_ratio")
    size = dict(image_processor.crop_size or image_processor.size)
    if aspect == "pad":
        pixel_options = {
            name: getattr(image_processor, name) for name in ("image_mean", "image_std", "resample", "rescale_factor")
        }
        size = {key: value for key, value in size.items() if key in ("height", "width")}
        return LlavaImageProcessor(do_pad=True, size=size, crop_size=size, **pixel_options)
    if aspect == "resize":
        image_processor.size, image_processor.do_center_crop = image_processor.crop_size or image_processor.size, False
    return image_processor
