"""Open the kinds of original checkpoints: locate each tensor under its original name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from csr_vlm.convert.layouts import ASPECTS, LANGUAGE_MODELS, PROJECTORS, STRATEGIES
from csr_vlm.core.errors import CsrError, reason_of
from csr_vlm.models.checkpoints import TensorLocation, checkpoint_tensors, file_tensors, find_file, read_tensors

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_VISION = "model.vision_tower.vision_tower.vision_model."
_PROJECTOR = "model.mm_projector."
_LORA_NAME = re.compile(r"(model\.layers\..+|lm_head)\.lora_[AB]\.weight")
_UNSUPPORTED_LORA_OPTIONS = ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern")
"""PEFT options with which a weight's update is not alpha / r times B A."""


@dataclass(frozen=True)
class Lora:
    """Hold a LoRA of the language model, which is small enough for memory."""

    config: dict[str, Any]
    tensors: dict[str, Any]
    """Tensor by original module name + ``.lora_A.weight`` or ``.lora_B.weight``."""

    @property
    def modules(self) -> set[str]:
        """Return the original names of the adapted modules."""
        return {name.rsplit(".lora_", 1)[0] for name in self.tensors}

    @property
    def scale(self) -> float:
        """Return the factor of B A: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        rank: int = self.config["r"]
        return float(self.config["lora_alpha"] / (rank**0.5 if self.config.get("use_rslora") else rank))


@dataclass(frozen=True)
class Original:
    """Hold an original checkpoint of any kind, completed with its base model and vision tower."""

    kind: str
    """full, projector, lora or vila."""
    config: dict[str, Any]
    tensors: dict[str, TensorLocation]
    """Location by original name, including the vision tower."""
    vision: str
    """Directory or hub id with the vision tower's configuration and image processor."""
    tokenizer: str
    """Directory or hub id with the tokenizer."""
    lora: Lora | None = None

    @property
    def projector(self) -> str:
        """Return ``mm_projector_type``."""
        return str(self.config.get("mm_projector_type", "linear"))


def open_original(source: Path, base: str | None = None, vision: str | None = None) -> Original:
    """Detect the kind of checkpoint in a directory and locate all its tensors.

    Args:
        source: Directory of the checkpoint.
        base: Directory or hub id of the language model (or whole LLaVA) that a LoRA or a
            projector belongs to.
        vision: Directory or hub id of the vision tower; by default the one that the checkpoint names.

    Raises:
        CsrError: The directory has no such checkpoint, a required part is missing, or the layout is
            not supported; the message names the reason.
    """
    if not source.is_dir():
        raise CsrError(f"there is no directory {source}", "download the checkpoint first with hf download NAME")
    if (source / "llm").is_dir():
        original = _open_vila(source)
    elif (source / "adapter_config.json").is_file():
        original = _open_lora(source, _require_base(base, source, "a LoRA"))
    elif checkpoint_tensors(source) is None and (source / "mm_projector.bin").is_file():
        original = _open_projector(source, _require_base(base, source, "a projector"))
    else:
        original = _open_full(source)
    _require_supported(source, original.config)
    return _with_vision(original, vision)


def _open_full(source: Path) -> Original:
    return Original("full", _config_of(source), _weights_of(source), "", str(source))


def _open_projector(source: Path, base: str) -> Original:
    config = _config_of(base) | (_config_of(source) if (source / "config.json").is_file() else {})
    tensors = _weights_of(base) | _extra_tensors(source / "mm_projector.bin")
    return Original("projector", config, tensors, "", base)


def _open_lora(source: Path, base: str) -> Original:
    config = _config_of(base) | (_config_of(source) if (source / "config.json").is_file() else {})
    tensors = _weights_of(base)
    if (source / "non_lora_trainables.bin").is_file():
        tensors |= _extra_tensors(source / "non_lora_trainables.bin")
    tokenizer = next((str(source) for name in _TOKENIZER_FILES if (source / name).is_file()), base)
    return Original("lora", config, tensors, "", tokenizer, _lora_of(source))


def _open_vila(source: Path) -> Original:
    """Open VILA's three folders, each of which is a checkpoint."""
    config = _config_of(source / "llm") | _multimodal_options(_config_of(source))
    kind = _config_of(source / "mm_projector").get("mm_projector_type")
    language = _config_of(source / "llm").get("model_type", "llama")
    config |= {"mm_projector_type": kind, "model_type": language}
    tensors = _weights_of(source / "llm")
    projector = _weights_of(source / "mm_projector").items()
    tensors |= {_PROJECTOR + name.removeprefix("layers."): location for name, location in projector}
    tensors |= _vision_tensors(str(source / "vision_tower"))
    return Original("vila", config, tensors, str(source / "vision_tower"), str(source / "llm"))


def _multimodal_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Select the options in VILA's root that concern the whole model; the language model's are in its folder."""
    return {key: value for key, value in config.items() if key.startswith(("mm_", "image_"))}


def _with_vision(original: Original, vision: str | None) -> Original:
    config = original.config
    tower = vision or original.vision or config.get("mm_vision_tower") or config.get("vision_tower")
    if not tower:
        raise CsrError("the checkpoint does not name its vision tower", "set --vision to a directory or a hub id")
    tensors = original.tensors
    if vision is not None or not any(name.startswith(_VISION) for name in tensors):
        others = {name: location for name, location in tensors.items() if not name.startswith(_VISION)}
        tensors = others | _vision_tensors(str(tower))
    return replace(original, tensors=tensors, vision=str(tower))


def _vision_tensors(source: str) -> dict[str, TensorLocation]:
    """Locate the tensors of a vision model, or of the vision half of a CLIP checkpoint."""
    tensors = checkpoint_tensors(source)
    if tensors is None:
        raise CsrError(f"there are no weights of a vision tower in {source}", "set --vision to a CLIP checkpoint")
    prefix = "vision_model."
    vision_half = {name.removeprefix(prefix): location for name, location in tensors.items() if name.startswith(prefix)}
    return {_VISION + name: location for name, location in (vision_half or tensors).items()}


def _lora_of(source: Path) -> Lora:
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = checkpoint_tensors(source, ADAPTER_FILES)
    if tensors is None:
        raise CsrError(f"there is no adapter in {source}", f"expected one of: {', '.join(ADAPTER_FILES)}")
    names = {name: _original_name(name).replace(".default.weight", ".weight") for name in tensors}
    unsupported = [option for option in _UNSUPPORTED_LORA_OPTIONS if config.get(option)]
    unsupported += sorted(name for name, original in names.items() if not _LORA_NAME.fullmatch(original))
    if unsupported:
        raise CsrError(
            f"{source} is not a plain LoRA of the language model: {', '.join(unsupported[:3])}",
            "merge it with the program that trained it and convert the merged model",
        )
    return Lora(config, {names[name]: tensor for name, tensor in read_tensors(tensors)})


def _extra_tensors(file: Path) -> dict[str, TensorLocation]:
    """Locate the tensors that were trained besides a LoRA, or a projector's."""
    return {_original_name(name): location for name, location in file_tensors(file).items()}


def _original_name(name: str) -> str:
    """Remove the prefixes that PEFT and training add to a tensor's original name."""
    name = name.removeprefix("base_model.").removeprefix("model.")
    bare = name.removeprefix("model.")
    return bare if bare.startswith("lm_head.") else f"model.{bare}"


def _weights_of(source: str | Path) -> dict[str, TensorLocation]:
    tensors = checkpoint_tensors(source)
    if tensors is None:
        raise CsrError(
            f"there are no weights in {source}", "expected one of: model.safetensors, pytorch_model.bin, or shards"
        )
    return tensors


def _config_of(source: str | Path) -> dict[str, Any]:
    path = find_file(source, "config.json")
    if path is None:
        raise CsrError(f"{source} has no config.json", "add the one that belongs to the weights")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CsrError(f"{path} cannot be read: {reason_of(error)}", "download it again") from None
    return config


def _require_base(base: str | None, source: Path, part: str) -> str:
    if base is None:
        raise CsrError(f"{source} holds {part} only", "set --base to the model that it belongs to")
    return base


def _require_supported(source: Path, config: Mapping[str, Any]) -> None:
    """Check that LlavaForConditionalGeneration supports the options.

    Raises:
        CsrError: It does not support one of them.
    """
    settings: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
        ("model_type", config.get("model_type"), LANGUAGE_MODELS),
        ("mm_projector_type", config.get("mm_projector_type", "linear"), tuple(PROJECTORS)),
        ("mm_vision_select_feature", config.get("mm_vision_select_feature", "patch"), tuple(STRATEGIES)),
        ("image_aspect_ratio", config.get("image_aspect_ratio"), ASPECTS),
        ("mm_patch_merge_type", config.get("mm_patch_merge_type", "flat"), ("flat",)),
        ("mm_use_im_start_end", bool(config.get("mm_use_im_start_end")), (False,)),
        ("mm_use_im_patch_token", bool(config.get("mm_use_im_patch_token")), (False,)),
        ("s2", bool(config.get("s2")), (False,)),
    )
    for name, value, supported in settings:
        if value not in supported:
            raise CsrError(
                f"{source} has {name} {value}, which cannot be converted",
                f"expected one of: {', '.join(map(str, supported))}",
            )
