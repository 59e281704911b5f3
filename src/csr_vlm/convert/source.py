"""Reading the kinds of original checkpoints: where each tensor lies, under its original name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csr_vlm.convert.layouts import ASPECTS, LANGUAGE_MODELS, PROJECTORS, STRATEGIES
from csr_vlm.core.errors import CsrError
from csr_vlm.models.checkpoints import Stored, checkpoint_tensors, file_tensors, find_file, read_tensors

ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_VISION = "model.vision_tower.vision_tower.vision_model."
_PROJECTOR = "model.mm_projector."
_PLAIN_LORA = re.compile(r"(model\.layers\..+|lm_head)\.lora_[AB]\.weight")
_NO_PLAIN_LORA = ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern")
"""Options of PEFT under which a weight's update is not alpha / r times B A."""


@dataclass(frozen=True)
class Lora:
    """A LoRA on the language model, small enough to be held."""

    config: dict[str, Any]
    tensors: dict[str, Any]
    """Original module name + ``.lora_A.weight`` or ``.lora_B.weight``."""

    @property
    def modules(self) -> set[str]:
        """Original names of the modules that have one."""
        return {name.rsplit(".lora_", 1)[0] for name in self.tensors}

    @property
    def scale(self) -> float:
        """Factor on B A."""
        rank: int = self.config["r"]
        return float(self.config["lora_alpha"] / (rank**0.5 if self.config.get("use_rslora") else rank))


@dataclass(frozen=True)
class Original:
    """An original checkpoint of any kind, with what it is completed by."""

    kind: str
    config: dict[str, Any]
    tensors: dict[str, Stored]
    """By original name, vision tower included."""
    vision: str
    """Directory or hub id with the vision tower's configuration and image processor."""
    tokenizer: str
    lora: Lora | None = None

    @property
    def projector(self) -> str:
        return str(self.config.get("mm_projector_type", "linear"))


def open_original(source: Path, base: str | None = None, vision: str | None = None) -> Original:
    """Find out what kind of checkpoint a directory holds, and where all its tensors are.

    Args:
        source: The checkpoint.
        base: Directory or hub id of the language model (or whole LLaVA) that a LoRA or a
            projector belongs to.
        vision: Directory or hub id of the vision tower; by default what the checkpoint names.

    Raises:
        CsrError: It is no such checkpoint, something it needs is missing, or its layout is
            one that cannot be converted, which is then named.
    """
    if not source.is_dir():
        raise CsrError(f"there is no directory {source}", "download the checkpoint first: hf download NAME")
    if (source / "llm").is_dir():
        found = _open_vila(source)
    elif (source / "adapter_config.json").is_file():
        found = _open_lora(source, _needed(base, source, "a LoRA"))
    elif checkpoint_tensors(source) is None and (source / "mm_projector.bin").is_file():
        found = _open_projector(source, _needed(base, source, "a projector"))
    else:
        found = _open_full(source)
    _refuse_unsupported(source, found.config)
    return _with_vision(found, vision)


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
    tokenizer = next((str(source) for name in _TOKENIZERS if (source / name).is_file()), base)
    return Original("lora", config, tensors, "", tokenizer, _lora_of(source))


_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def _open_vila(source: Path) -> Original:
    """Three folders, each a checkpoint of its own."""
    config = _config_of(source / "llm") | _without_parts(_config_of(source))
    kind = _config_of(source / "mm_projector").get("mm_projector_type")
    language = _config_of(source / "llm").get("model_type", "llama")
    config |= {"mm_projector_type": kind, "model_type": language}
    tensors = _weights_of(source / "llm")
    projector = _weights_of(source / "mm_projector").items()
    tensors |= {_PROJECTOR + name.removeprefix("layers."): stored for name, stored in projector}
    tensors |= _vision_tensors(str(source / "vision_tower"))
    return Original("vila", config, tensors, str(source / "vision_tower"), str(source / "llm"))


def _without_parts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of VILA's root that are about the whole; the language model's are in its folder."""
    return {key: value for key, value in config.items() if key.startswith(("mm_", "image_"))}


def _with_vision(found: Original, vision: str | None) -> Original:
    where = vision or found.vision or found.config.get("mm_vision_tower") or found.config.get("vision_tower")
    if not where:
        raise CsrError("the checkpoint does not name its vision tower", "name a directory or hub id: --vision")
    tensors = found.tensors
    if vision is not None or not any(name.startswith(_VISION) for name in tensors):
        kept = {name: stored for name, stored in tensors.items() if not name.startswith(_VISION)}
        tensors = kept | _vision_tensors(str(where))
    return Original(found.kind, found.config, tensors, str(where), found.tokenizer, found.lora)


def _vision_tensors(where: str) -> dict[str, Stored]:
    """The vision half of a CLIP checkpoint, or a vision model of its own."""
    stored = checkpoint_tensors(where)
    if stored is None:
        raise CsrError(f"there are no weights of a vision tower in {where}", "name a CLIP checkpoint: --vision")
    inner = {name.removeprefix("vision_model."): at for name, at in stored.items() if name.startswith("vision_model.")}
    return {_VISION + name: at for name, at in (inner or stored).items()}


def _lora_of(source: Path) -> Lora:
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    stored = checkpoint_tensors(source, ADAPTER)
    if stored is None:
        raise CsrError(f"there is no adapter in {source}", f"it needs one of {', '.join(ADAPTER)}")
    names = {name: _unwrapped(name).replace(".default.weight", ".weight") for name in stored}
    odd = [option for option in _NO_PLAIN_LORA if config.get(option)]
    odd += sorted(name for name, own in names.items() if not _PLAIN_LORA.fullmatch(own))
    if odd:
        raise CsrError(
            f"{source} is more than a plain LoRA on the language model: {', '.join(odd[:3])}",
            "merge it where it was trained and convert the whole",
        )
    return Lora(config, {names[name]: tensor for name, tensor in read_tensors(stored)})


def _extra_tensors(file: Path) -> dict[str, Stored]:
    """What was trained beside a LoRA, or a projector alone."""
    return {_unwrapped(name): stored for name, stored in file_tensors(file).items()}


def _unwrapped(name: str) -> str:
    """Take off what PEFT and training put before a tensor's original name."""
    name = name.removeprefix("base_model.").removeprefix("model.")
    bare = name.removeprefix("model.")
    return bare if bare.startswith("lm_head.") else f"model.{bare}"


def _weights_of(where: str | Path) -> dict[str, Stored]:
    stored = checkpoint_tensors(where)
    if stored is None:
        raise CsrError(f"there are no weights in {where}", "it needs model.safetensors or pytorch_model.bin, or shards")
    return stored


def _config_of(where: str | Path) -> dict[str, Any]:
    path = find_file(where, "config.json")
    if path is None:
        raise CsrError(f"{where} has no config.json", "it says how the model is built")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CsrError(f"{path} cannot be read: {error}", "download it again") from None
    return config


def _needed(base: str | None, source: Path, what: str) -> str:
    if base is None:
        raise CsrError(f"{source} holds {what} only", "name the model it belongs to: --base")
    return base


def _refuse_unsupported(source: Path, config: Mapping[str, Any]) -> None:
    """Name what LlavaForConditionalGeneration cannot express."""
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
    for name, value, known in settings:
        if value not in known:
            can = ", ".join(str(choice) for choice in known)
            raise CsrError(f"{source} has {name} {value}, which cannot be converted", f"what can be: {can}")
