"""List the names of tensors and options in original LLaVA-format checkpoints, as data.

"Original" names are those of the LLaVA repository's full checkpoints. Those of the other kinds
(LoRA, projector only, VILA's folders) are converted to them first.
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
"""(original prefix, prefix of the module in transformers' LlavaForConditionalGeneration)."""

TO_DISK = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
"""(module prefix, prefix in published LLaVA checkpoints, which all versions of transformers and vLLM read)."""

PROJECTORS = {
    "linear": {"weight": "linear_1.weight", "bias": "linear_1.bias"},
    "mlp2x_gelu": {
        "0.weight": "linear_1.weight",
        "0.bias": "linear_1.bias",
        "2.weight": "linear_2.weight",
        "2.bias": "linear_2.bias",
    },
}
"""Names in transformers' projector by names in the original's, by ``mm_projector_type``. A linear projector
gets an identity as its second layer, with no activation in between."""

ACTIVATIONS = {"linear": "linear", "mlp2x_gelu": "gelu"}
"""Activation between the projector's layers by ``mm_projector_type``."""

DROPPED_NAMES = re.compile(
    r"rotary_emb\.inv_freq$"  # computed from the configuration
    r"|embeddings\.position_ids$"  # 0, 1, 2, ...
    r"|vision_model\.head\."  # SigLIP's pooling, which LLaVA does not use
    r"|^model\.image_newline$"  # only for image grids, which are not supported
)
"""Tensors that are not converted."""

ASPECTS = ("pad", "resize", "square", None)
"""Values of ``image_aspect_ratio`` that give one square image: padded, stretched or center-cropped."""

LANGUAGE_MODELS = ("llava", "llava_llama", "llama")
"""Values of ``model_type`` for a Llama language model, which the vicuna_v1 template is for."""

STRATEGIES = {"patch": "default", "cls_patch": "full"}
"""``vision_feature_select_strategy`` by ``mm_vision_select_feature``: patches alone, or with the class token."""

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
"""Chat template that LLaVA-1.5 was trained with, with images first in a turn. GAP is replaced by an empty
string or a space; see :func:`csr_vlm.convert.target.gap_after_image`."""


def replace_prefix(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    """Replace a prefix by the table; None if no prefix matches."""
    return next((new + name.removeprefix(old) for old, new in table if name.startswith(old)), None)


def module_name(original: str, projector: str) -> str | None:
    """Return the name of an original tensor in transformers' module; None if no rule applies."""
    name = replace_prefix(original, TO_MODULE)
    prefix = "model.multi_modal_projector."
    if name is not None and name.startswith(prefix):
        inner = PROJECTORS[projector].get(name.removeprefix(prefix))
        return prefix + inner if inner else None
    return name


def disk_name(module: str) -> str:
    """Return the name of a module's tensor in published checkpoints."""
    name = replace_prefix(module, TO_DISK)
    assert name is not None, module
    return name
