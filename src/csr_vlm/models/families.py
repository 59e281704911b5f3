"""What model families do differently, as data.

A family is found by its configuration's ``model_type``. The code that reads this table is
the same for all; a model type that is not in it is taken for ``Family()``, whose defaults
assume least, and :mod:`csr_vlm.generation.self_check` tells whether that was right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """The quirks of one model type."""

    features: Literal["each", "stacked", "never"] = "never"
    """How image features computed beforehand go in: a tensor an image, one of all images' tiles, or not at all."""
    positions: Literal["counted", "mrope"] = "counted"
    """Token positions: counted along the row, or in time, height and width (Qwen)."""
    first_position: int = 0
    """Position of a row's first token, where they are counted."""
    response_type: int = 0
    """Token type of what the model writes; PaliGemma tells prompt (0) from answer (1) by it."""
    causal: bool = False
    """Whether every token sees all before it and none after it; in some the picture's see each other."""
    chat: bool = True
    """Whether the processor needs a chat template; without, the picture and the question are the prompt."""
    text_module: str = "(language_model|text_model)"
    """Name (regex) of the language model inside the model."""
    projectors: tuple[str, ...] = ("multi_modal_projector", "connector", "merger")
    """Names of what maps image features to the language model's width."""


_LLAVA = Family(features="each", causal=True, text_module="language_model", projectors=("multi_modal_projector",))
_STACKED = Family(features="stacked", causal=True, text_module="language_model", projectors=("multi_modal_projector",))
_QWEN = Family(features="each", positions="mrope", causal=True, text_module="language_model", projectors=("merger",))
_IDEFICS = Family(features="each", causal=True, text_module="text_model", projectors=("connector",))

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llava": _LLAVA,
        "llava_next": _LLAVA,
        "llava_onevision": _LLAVA,
        "mistral3": _LLAVA,
        "vipllava": _STACKED,
        "internvl": _STACKED,
        "gemma3": replace(_STACKED, causal=False),
        "paligemma": Family(
            features="stacked",
            first_position=1,
            response_type=1,
            chat=False,
            text_module="language_model",
            projectors=("multi_modal_projector",),
        ),
        "qwen2_vl": _QWEN,
        "qwen2_5_vl": _QWEN,
        "qwen3_vl": Family(
            features="each",
            positions="mrope",
            causal=True,
            text_module="language_model",
            projectors=("merger", "deepstack_merger_list"),
        ),
        "idefics3": _IDEFICS,
        "smolvlm": _IDEFICS,
    }
)

NOT_INPUTS = frozenset({"input_ids", "attention_mask", "labels"})
"""What a processor returns that is no extra input; PaliGemma's adds labels unasked."""

NOT_QUANTIZED = (
    "lm_head",
    "vision_tower",
    "vision_model",
    "visual",
    "multi_modal_projector",
    "connector",
)
"""Modules, by name, that stay in full precision when a model is loaded in 4 bits."""

PICTURE_TOKENS = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "video_token_index",
    "boi_token_id",
    "eoi_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
)
"""Options of a configuration that name ids standing for pictures."""


def family_of(config: Any) -> Family:
    """Look up the family of a model's configuration."""
    return FAMILIES.get(config.model_type, Family())


def picture_ids(config: Any, processor: Any) -> list[int]:
    """List the ids that stand for pictures or their borders, sorted.

    A response that contained an image placeholder could not be read back: the model would
    look for an image that is not there.
    """
    found = {getattr(config, name, None) for name in PICTURE_TOKENS}
    found |= set(getattr(processor, "image_token_ids", None) or [])
    return sorted(token for token in found if isinstance(token, int))
