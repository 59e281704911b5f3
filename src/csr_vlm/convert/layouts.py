"""Names of tensors and options in original LLaVA-format checkpoints, as data.

"Original" names are those of the LLaVA repository's own full checkpoints; the other kinds
(LoRA, projector only, VILA's folders) are brought to them first.
"""

from __future__ import annotations

import re

TO_MODULE = (
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.", "model.language_model.layers."),
    ("model.norm.", "model.language_model.norm."),
    ("lm_head.", "lm_head."),
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.mm_projector.", "model.multi_modal_projector."),
)
"""Original prefix, prefix of the module in transformers' LlavaForConditionalGeneration."""

TO_DISK = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
"""Module prefix, prefix in published LLaVA checkpoints, which every version of transformers and vLLM reads."""

PROJECTORS = {
    "linear": {"weight": "linear_1.weight", "bias": "linear_1.bias"},
    "mlp2x_gelu": {
        "0.weight": "linear_1.weight",
        "0.bias": "linear_1.bias",
        "2.weight": "linear_2.weight",
        "2.bias": "linear_2.bias",
    },
}
"""``mm_projector_type``: names in the original's projector, in transformers'. A linear one gets an
identity as its second layer, with no activation between."""

ACTIVATIONS = {"linear": "linear", "mlp2x_gelu": "gelu"}

DROPPED = re.compile(
    r"rotary_emb\.inv_freq$"  # computed from the configuration
    r"|embeddings\.position_ids$"  # 0, 1, 2, ...
    r"|vision_model\.head\."  # SigLIP's pooling, which LLaVA does not use
    r"|^model\.image_newline$"  # for image grids, which are refused, so unused
)

ASPECTS = ("pad", "resize", "square", None)
"""``image_aspect_ratio`` that one square image can be made from: padded, stretched, or its middle."""

LANGUAGE_MODELS = ("llava", "llava_llama", "llama")
"""``model_type`` of the language part: Llama, which vicuna_v1's template is for."""

STRATEGIES = {"patch": "default", "cls_patch": "full"}
"""``mm_vision_select_feature``: patches alone, or with whatever token stands before them."""

VICUNA_V1 = (
    "{% if messages[0]['role'] != 'system' %}A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. {% endif %}"
    "{% for message in messages %}"
    "{% set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string"
    " else message['content'] %}"
    "{{ {'user': 'USER: ', 'assistant': 'ASSISTANT: '}.get(message['role'], '') }}"
    "{% for part in parts if part['type'] == 'image' %}{{ '<image>GAP\n' }}{% endfor %}"
    "{% for part in parts if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""The conversation that LLaVA-1.5 was trained with, images first in a turn. GAP is nothing or a space,
see :func:`csr_vlm.convert.target.gap_after_image`."""


def renamed(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    """Replace the prefix that the table has; None where it has none."""
    return next((new + name.removeprefix(old) for old, new in table if name.startswith(old)), None)


def module_name(original: str, projector: str) -> str | None:
    """Name an original tensor as transformers' module does; None where no rule covers it."""
    name = renamed(original, TO_MODULE)
    prefix = "model.multi_modal_projector."
    if name is not None and name.startswith(prefix):
        inner = PROJECTORS[projector].get(name.removeprefix(prefix))
        return prefix + inner if inner else None
    return name


def disk_name(module: str) -> str:
    """Name a module's tensor as published checkpoints do."""
    name = renamed(module, TO_DISK)
    assert name is not None, module
    return name
