"""Read the shape of a model from its config.json or from a table of published models; no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from csr_vlm.config.model_size import parameters_in_name
from csr_vlm.config.schema import ModelConfig

_PICTURE = 640 * 480
"""Pixels of the picture that image tokens are estimated for."""
_LLAMA_TOKENS = 32_000
_CLIP_PARAMETERS = 320_000_000
_CLIP_TOKENS = 576


@dataclass(frozen=True)
class Architecture:
    """Hold the dimensions of a model from which its costs follow."""

    model_type: str
    layers: int
    width: int
    intermediate: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    tied: bool
    """Whether the output layer shares the weights of the embeddings."""
    context: int
    """Largest number of tokens of a row."""
    vision_parameters: int
    """Parameters of the vision encoder and the projector."""
    vision_tokens: int
    """Patches that the vision encoder computes for a picture of 640 x 480 pixels."""
    image_tokens: int
    """Tokens that the language model reads of that picture."""
    max_image_tokens: int
    """The most tokens of any picture."""
    source: str = "config.json"

    @property
    def layer_parameters(self) -> int:
        """Return the parameters of all layers of the language model, without embeddings and output layer."""
        attention = 2 * self.width * self.head_width * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.intermediate)

    @property
    def head_parameters(self) -> int:
        """Return the parameters of the output layer, which the embeddings may share."""
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """Return all parameters."""
        tables = self.head_parameters * (1 if self.tied else 2)
        return self.layer_parameters + tables + self.vision_parameters

    def weight_bytes(self, bytes_per_weight: float, *, nf4: bool) -> float:
        """Return the bytes of all weights; in 4 bits, embeddings, output layer and vision encoder keep 16 bits."""
        if not nf4:
            return self.parameters * bytes_per_weight
        return self.layer_parameters * NF4_BYTES + (self.parameters - self.layer_parameters) * 2.0

    def cache_bytes(self, bytes_per_value: float) -> float:
        """Return the bytes of one token's keys and values in all layers."""
        return 2.0 * self.layers * self.kv_heads * self.head_width * bytes_per_value

    def pass_bytes(self, tokens: float, bytes_per_value: float) -> float:
        """Return the bytes of one forward pass: the keys and values of its tokens, and the activations of a layer."""
        activations = bytes_per_value * (8 * self.width + 3 * self.intermediate)
        return tokens * (self.cache_bytes(bytes_per_value) + activations)

    def lora_parameters(self, rank: int) -> int:
        """Count the parameters of a LoRA of this rank on all seven linear maps of each layer."""
        queries, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        sides = 2 * (self.width + queries) + 2 * (self.width + keys) + 3 * (self.width + self.intermediate)
        return rank * sides * self.layers

    @classmethod
    def of_size(cls, parameters: int) -> Architecture:
        """Guess the shape of a LLaVA-like model: 12 * layers * width^2 parameters, width = 128 * layers."""
        layers = max(round((parameters / (12 * 128**2)) ** (1 / 3)), 1)
        width = 128 * layers
        return cls(
            "", layers, width, round(8 * width / 3), layers, layers, 128, _LLAMA_TOKENS, False, 4096,
            _CLIP_PARAMETERS, _CLIP_TOKENS, _CLIP_TOKENS, _CLIP_TOKENS, "the size in its name",
        )  # fmt: skip


NF4_BYTES = 0.516
"""Bytes of a weight in 4 bits with its share of doubly quantized scales (QLoRA, arXiv 2305.14314: 4.127 bits)."""


@dataclass(frozen=True)
class ScorerShape:
    """Hold the dimensions of a CLIP model from which the costs of scoring follow."""

    vision_parameters: int = 304_000_000
    vision_tokens: int = 577
    text_parameters: int = 85_000_000
    parameters: int = 428_000_000


def read_architecture(model: ModelConfig, *, offline: bool) -> Architecture | None:
    """Read a model's architecture: from its configuration on disk, else the table, else the Hub, else its name.

    Args:
        model: Model of a run.
        offline: Do not contact the Hub.

    Returns:
        The architecture; None if nothing tells it.

    Raises:
        CsrError: The model is not an image-text-to-text model or, unless offline, does not exist.
    """
    directory = local_directory(model)
    if directory is not None:
        return _architecture_of(model.model_copy(update={"path": str(directory), "revision": None}))
    if (published := published_architecture(model.path)) is not None:
        return published
    if not offline:
        return _architecture_of(model)
    size = parameters_in_name(model.path)
    return None if size is None else Architecture.of_size(size)


def published_architecture(path: str) -> Architecture | None:
    """Return the architecture of a published model by its Hub ID, or by the same name in another folder."""
    models: Mapping[str, Any] = _table()["models"]
    found = models.get(path) or {name.rpartition("/")[2]: one for name, one in models.items()}.get(Path(path).name)
    return None if found is None else Architecture(**found, source="the table of published models")


def scorer_shape(path: str) -> ScorerShape:
    """Return the dimensions of a scorer: of one on disk, of one in the table, or of CLIP ViT-L/14 at 336 pixels."""
    if Path(path).is_dir():
        return _scorer_on_disk(path)
    return ScorerShape(**_table()["scorers"].get(path, {}))


@cache
def _scorer_on_disk(path: str) -> ScorerShape:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path)
        vision, text = config.vision_config, config.text_config
        towers = [
            one.num_hidden_layers * (4 * one.hidden_size**2 + 2 * one.hidden_size * one.intermediate_size)
            for one in (vision, text)
        ]
        patches = (vision.image_size // vision.patch_size) ** 2
        return ScorerShape(towers[0], patches + 1, towers[1], sum(towers) + text.vocab_size * text.hidden_size)
    except (OSError, ValueError, KeyError, AttributeError):  # A scorer of another kind, such as open_clip's.
        return ScorerShape()


def local_directory(model: ModelConfig) -> Path | None:
    """Return the directory of a model that is on disk or in the Hub's cache; None if it would be downloaded."""
    directory = Path(model.path)
    if directory.is_dir():
        return directory
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    except HFValidationError:  # A path of a directory that does not exist.
        return None
    return Path(cached).parent if isinstance(cached, str) else None


@cache
def _table() -> Mapping[str, Any]:
    text = resources.files("csr_vlm.models").joinpath("published.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def _architecture_of(model: ModelConfig) -> Architecture:
    """Read a configuration with transformers, which fills in what the file leaves to defaults."""
    from transformers import AutoConfig

    from csr_vlm.core.hub import require_on_disk_or_reachable
    from csr_vlm.models.load_errors import load_error, require_image_text_to_text

    require_on_disk_or_reachable("model.path", model.path, model.revision)
    try:
        config = AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        require_image_text_to_text(config, model.path)
        return architecture_of(config)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise load_error("model", model.path, error) from None


def architecture_of(config: Any) -> Architecture:
    """Return the architecture that a configuration of transformers describes.

    Raises:
        AttributeError: The configuration has other names for its dimensions than any known family.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    vision = getattr(config, "vision_config", None)
    vision_parameters, patches = (0, 0) if vision is None else _vision_size(vision, text.hidden_size)
    image_tokens = _image_tokens(config, vision, patches)
    return Architecture(
        model_type=config.model_type,
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_width=head_width,
        vocabulary=text.vocab_size,
        tied=bool(getattr(config, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False)),
        context=text.max_position_embeddings,
        vision_parameters=vision_parameters,
        vision_tokens=patches,
        image_tokens=image_tokens,
        max_image_tokens=image_tokens,
    )


def _vision_size(vision: Any, text_width: int) -> tuple[int, int]:
    """Return the parameters of a vision encoder with its projector, and its patches of a picture of 640 x 480."""
    # Qwen2-VL calls the width of the language model hidden_size here.
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    layers = getattr(vision, "num_hidden_layers", None) or vision.depth
    inner = getattr(vision, "intermediate_size", None) or int(getattr(vision, "mlp_ratio", 4) * width)
    maps = 3 if vision.model_type.startswith("qwen2_5_vl") else 2
    patch, side = _first(vision.patch_size), _first(getattr(vision, "image_size", None) or 0)
    merged = width * getattr(vision, "spatial_merge_size", 1) ** 2
    projector = merged * merged + merged * text_width if merged != width else width * text_width + text_width**2
    parameters = layers * (4 * width**2 + maps * width * inner) + 3 * patch * patch * width + projector
    return parameters, (side // patch) ** 2 if side else _PICTURE // patch**2


def _image_tokens(config: Any, vision: Any, patches: int) -> int:
    """Estimate the tokens of a picture where the processor is not there to count them."""
    named = getattr(config, "mm_tokens_per_image", None) or getattr(config, "image_seq_length", None)
    if named:
        return int(named)
    merge = getattr(vision, "spatial_merge_size", 1) if vision is not None else 1
    return int(patches // (merge**2 * getattr(config, "scale_factor", 1) ** 2))


def _first(size: Any) -> int:
    return int(size[0] if isinstance(size, (list, tuple)) else size)
