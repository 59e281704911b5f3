"""Embed images and texts with CLIP, SigLIP and SigLIP 2 (NaFlex included) through transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModel, AutoProcessor

from csr_vlm.config.schema import ModelConfig, OneScorerConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.hub import require_on_disk_or_reachable
from csr_vlm.models.checkpoints import checkpoint_tensors, read_tensors
from csr_vlm.models.load_errors import load_error

_SIGLIP = ("siglip", "siglip2")
_SUPPORTED = ("clip", *_SIGLIP)
"""Supported values of ``model_type``."""


class TransformersEncoder:
    """Embed with a transformers checkpoint in float32.

    SigLIP was trained on lower-case text padded to the full length, with attention to the
    padding; it gets the same input here, whatever its tokenizer's settings.

    Args:
        config: Configuration of the scorer.
        device: Name of the torch device.
        policy: Policy whose vision tower to use with ``vision: policy``.

    Raises:
        CsrError: The checkpoint cannot be loaded, its type is not supported, or the policy's
            vision tower does not fit.
    """

    def __init__(self, config: OneScorerConfig, device: str, policy: ModelConfig | None = None) -> None:
        require_on_disk_or_reachable("scorer.path", config.path, config.revision)
        try:
            self._model = AutoModel.from_pretrained(config.path, revision=config.revision, dtype=torch.float32)
            self._processor: Any = AutoProcessor.from_pretrained(config.path, revision=config.revision)
        except (OSError, ValueError, KeyError) as error:
            raise load_error("scorer", config.path, error) from None
        model_type = self._model.config.model_type
        if model_type not in _SUPPORTED:
            raise CsrError(
                f"{config.path}: {model_type!r} is not a supported scorer type; expected one of: "
                f"{', '.join(_SUPPORTED)}",
                "use another checkpoint, or a class of your own: scorer.path=python:MODULE:CLASS",
            )
        if config.vision == "policy":
            use_vision_of(policy, self._model, config.path)
        self._model = self._model.to(device).eval()
        self._is_siglip = model_type in _SIGLIP
        self.max_tokens: int = self._model.config.text_config.max_position_embeddings

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of each text before truncation, special tokens included."""
        return [len(ids) for ids in self._processor.tokenizer(self._cased(texts), verbose=False)["input_ids"]]

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts, truncated to ``max_tokens``; return a tensor of shape (texts, width), not normalized."""
        tokens = self._processor.tokenizer(
            self._cased(texts),
            padding="max_length" if self._is_siglip else True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(self._model.device)
        mask = None if self._is_siglip else tokens["attention_mask"]
        output = self._model.get_text_features(input_ids=tokens["input_ids"], attention_mask=mask)
        features: torch.Tensor = output.pooler_output
        return features

    def embed_images(self, images: Sequence[Any]) -> torch.Tensor:
        """Embed RGB images; return a tensor of shape (images, width), not normalized."""
        inputs = self._processor.image_processor(images=list(images), return_tensors="pt").to(self._model.device)
        features: torch.Tensor = self._model.get_image_features(**inputs).pooler_output
        return features

    def _cased(self, texts: Sequence[str]) -> list[str]:
        return [text.lower() for text in texts] if self._is_siglip else list(texts)


def use_vision_of(policy: ModelConfig | None, scorer: torch.nn.Module, path: str) -> None:
    """Replace a scorer's vision tower by the one of a policy's checkpoint (section 3.2.1).

    The scorer keeps its text tower and both projections. DPO does not train the vision tower, so
    the base checkpoint's is the same in every iteration.

    Args:
        policy: Configuration of the policy.
        scorer: Model with a ``vision_model``, modified in place.
        path: Path of the scorer, for error messages.

    Raises:
        CsrError: There is no policy, or its tower has other tensors or shapes.
    """
    if policy is None:
        raise CsrError("scorer.vision=policy needs a policy to take the vision tower from", "set scorer.vision=own")
    files = checkpoint_tensors(policy.path, revision=policy.revision) or {}
    tensors = dict(
        read_tensors({tower_name: file for name, file in files.items() if (tower_name := tower_tensor(name))})
    )
    tower: Any = scorer.vision_model
    expected = {name: tensor.shape for name, tensor in tower.state_dict().items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != expected:
        raise CsrError(
            f"the vision tower of {policy.path} does not fit {path}: {_difference(tensors, expected)}",
            "use the scorer that the policy's tower comes from, or set scorer.vision=own",
        )
    tower.load_state_dict(tensors)


def tower_tensor(name: str) -> str:
    """Return a LLaVA-like checkpoint's tensor name relative to its vision tower; empty for other tensors.

    Example:
        >>> tower_tensor("model.vision_tower.vision_model.post_layernorm.weight")
        'post_layernorm.weight'
        >>> tower_tensor("lm_head.weight")
        ''
    """
    _, separator, rest = name.rpartition("vision_tower.")
    return rest.removeprefix("vision_model.") if separator else ""


def _difference(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size]) -> str:
    """Describe the first tensor whose shape differs."""
    if not tensors:
        return "the policy has none"
    name = next(n for n in [*expected, *tensors] if n not in tensors or tensors[n].shape != expected.get(n))
    policy_shape = tuple(tensors[name].shape) if name in tensors else "missing"
    scorer_shape = tuple(expected[name]) if name in expected else "missing"
    return f"{name} is {policy_shape} in the policy and {scorer_shape} in the scorer"
