"""Describe how model families differ, as data.

A family is looked up by its configuration's ``model_type``. The code that reads this table is the
same for all families. A model type without an entry gets ``Family()``, whose defaults assume
least, and :mod:`csr_vlm.generation.self_check` finds out whether they are right.

To add a family:

1. Try it: ``csr check`` on a recipe with the model compares the log-probabilities of generation
   with those of transformers' own forward pass. If they agree, generation and scoring work.
2. Add an entry to :data:`FAMILIES`, which speeds up generation (``features``) and training
   (``causal``) and is required for other token positions or a model without a chat template.
   Name the language model (``text_module``) and the projectors, so that LoRA adapts the former only.
3. If its configuration names image tokens in a new way, add the option to :data:`IMAGE_TOKEN_OPTIONS`;
   if its vision modules have new names, add them to :data:`FULL_PRECISION_MODULES`.
4. Add a function that builds a tiny checkpoint to ``tests/families/checkpoints.py``. Every test in
   ``tests/families`` then runs on it, and ``python -m tests.families.table`` writes docs/families.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """Describe one model type."""

    features: Literal["per_image", "stacked", "never"] = "never"
    """Form in which the model accepts precomputed image features: a list with one tensor per image,
    one tensor with the tiles of all images, or not at all."""
    positions: Literal["sequential", "mrope"] = "sequential"
    """Token positions: one index per token, or three, for time, height and width (Qwen's M-RoPE)."""
    first_position: int = 0
    """Position of a row's first token, if positions are sequential."""
    response_token_type: int = 0
    """Token type id of response tokens; PaliGemma distinguishes prompt (0) and response (1) by it."""
    causal: bool = False
    """True if every token attends to all earlier tokens and to no later one; in some families the
    tokens of an image attend to each other."""
    chat: bool = True
    """True if prompts are formatted by a chat template; if false, the prompt is the image and the question."""
    text_module: str = "(language_model|text_model)"
    """Regular expression for the name of the language model inside the model."""
    projectors: tuple[str, ...] = ("multi_modal_projector", "connector", "merger")
    """Names of the modules that map image features to the width of the language model."""


_LLAVA = Family(features="per_image", causal=True, text_module="language_model", projectors=("multi_modal_projector",))
_STACKED = replace(_LLAVA, features="stacked")
_QWEN = Family(
    features="per_image", positions="mrope", causal=True, text_module="language_model", projectors=("merger",)
)
_IDEFICS = Family(features="per_image", causal=True, text_module="text_model", projectors=("connector",))

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llava": _LLAVA,
        "llava_next": _LLAVA,
        "llava_onevision": _LLAVA,
        "mistral3": _LLAVA,
        "vipllava": _STACKED,
        "internvl": _STACKED,
        "gemma3": replace(_STACKED, causal=False),
        "paligemma": replace(_STACKED, causal=False, first_position=1, response_token_type=1, chat=False),
        "qwen2_vl": _QWEN,
        "qwen2_5_vl": _QWEN,
        "qwen3_vl": replace(_QWEN, projectors=("merger", "deepstack_merger_list")),
        "idefics3": _IDEFICS,
        "smolvlm": _IDEFICS,
    }
)
"""Family by ``model_type``."""

NOT_EXTRA_INPUTS = frozenset({"input_ids", "attention_mask", "labels"})
"""Outputs of a processor that are not extra inputs of the model; PaliGemma's always adds labels."""

FULL_PRECISION_MODULES = (
    "lm_head",
    "vision_tower",
    "vision_model",
    "visual",
    "multi_modal_projector",
    "connector",
)
"""Names of modules that are not quantized when a model is loaded in 4 bits."""

IMAGE_TOKEN_OPTIONS = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "video_token_index",
    "boi_token_id",
    "eoi_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
)
"""Options of a configuration that name tokens for images, videos or their borders."""


_TOKEN_ATTRIBUTES = (
    *("image_token", "video_token", "audio_token", "boi_token", "eoi_token", "image_break_token", "image_end_token"),
    *("fake_image_token", "global_image_tag", "global_image_token", "start_image_token", "end_image_token"),
    *("context_image_token", "vision_start_token", "vision_end_token"),
)
"""Attributes of processors and tokenizers that hold tokens for images, videos or their borders."""


def family_of(config: Any) -> Family:
    """Return the family of a model's configuration."""
    return FAMILIES.get(config.model_type, Family())


def image_token_ids(config: Any, processor: Any) -> list[int]:
    """Return the sorted ids that stand for images or their borders.

    A response with such a token could not be encoded again, since the model would expect an
    image that does not exist.
    """
    ids = {getattr(config, name, None) for name in IMAGE_TOKEN_OPTIONS}
    ids |= set(getattr(processor, "image_token_ids", None) or [])
    return sorted(token for token in ids if isinstance(token, int))


_PLACEHOLDER = re.compile(r"[<\[].*(image|img|video|vision|audio|row_\d+_col_\d+).*[>\]]", re.IGNORECASE)
"""Form of the tokens of a vocabulary that stand for images, videos, sounds, or parts and borders of them."""


def placeholder_tokens(config: Any, processor: Any) -> tuple[str, ...]:
    """Return the sorted tokens that a processor or a model reads as an image, a video, or a border of one.

    They are the tokens of :func:`image_token_ids`, those that the processor and its tokenizer name (attributes such
    as ``image_token``), and the special tokens whose form says so, such as ``<|video_pad|>``.
    """
    tokenizer = processor.tokenizer
    named = [
        value
        for owner in (processor, tokenizer)
        for name in _TOKEN_ATTRIBUTES
        if isinstance(value := getattr(owner, name, None), str)
    ]
    by_id = tokenizer.convert_ids_to_tokens(image_token_ids(config, processor))
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if _PLACEHOLDER.fullmatch(str(token))]
    return tuple(sorted({token for token in (*named, *by_id, *special) if token and token.strip()}))
