"""CLIP, SigLIP and SigLIP 2 (NaFlex too) through transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModel, AutoProcessor

from csr_vlm.config.schema import ModelConfig, OneScorerConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.models.checkpoints import checkpoint_tensors, read_tensors
from csr_vlm.models.load_errors import load_error

_SIGLIP = ("siglip", "siglip2")
_KNOWN = ("clip", *_SIGLIP)


class TransformersEncoder:
    """The towers of a transformers checkpoint, in float32.

    SigLIP was trained on lower-case text padded to its full length, the padding attended
    to; it gets the same here, whatever its tokenizer's settings say.
    """

    def __init__(self, config: OneScorerConfig, device: str, policy: ModelConfig | None = None) -> None:
        try:
            self._model = AutoModel.from_pretrained(config.path, revision=config.revision, dtype=torch.float32)
            self._processor: Any = AutoProcessor.from_pretrained(config.path, revision=config.revision)
        except (OSError, ValueError, KeyError) as error:
            raise load_error("scorer", config.path, error) from None
        kind = self._model.config.model_type
        if kind not in _KNOWN:
            raise CsrError(
                f"{config.path} is a {kind} model; scorers are {', '.join(_KNOWN)}",
                "or a class of your own: scorer.path=python:MODULE:CLASS",
            )
        if config.vision == "policy":
            use_vision_of(policy, self._model, config.path)
        self._model = self._model.to(device).eval()
        self._siglip = kind in _SIGLIP
        self.max_tokens: int = self._model.config.text_config.max_position_embeddings

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._processor.tokenizer(self._cased(texts), verbose=False)["input_ids"]]

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        tokens = self._processor.tokenizer(
            self._cased(texts),
            padding="max_length" if self._siglip else True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(self._model.device)
        mask = None if self._siglip else tokens["attention_mask"]
        output = self._model.get_text_features(input_ids=tokens["input_ids"], attention_mask=mask)
        features: torch.Tensor = output.pooler_output
        return features

    def embed_images(self, images: Sequence[Any]) -> torch.Tensor:
        inputs = self._processor.image_processor(images=list(images), return_tensors="pt").to(self._model.device)
        features: torch.Tensor = self._model.get_image_features(**inputs).pooler_output
        return features

    def _cased(self, texts: Sequence[str]) -> list[str]:
        return [text.lower() for text in texts] if self._siglip else list(texts)


def use_vision_of(policy: ModelConfig | None, scorer: torch.nn.Module, path: str) -> None:
    """Put the vision tower of a policy's checkpoint into a scorer (section 3.2.1).

    The scorer keeps its text tower and both projections. DPO leaves the tower alone, so
    the base checkpoint's is that of every iteration.

    Raises:
        CsrError: There is no policy, or its tower has other tensors or shapes.
    """
    if policy is None:
        raise CsrError("there is no policy whose vision tower the scorer could use", "set scorer.vision=own")
    stored = checkpoint_tensors(policy.path, revision=policy.revision) or {}
    found = dict(read_tensors({own: where for name, where in stored.items() if (own := tower_tensor(name))}))
    tower: Any = scorer.vision_model
    expected = {name: tensor.shape for name, tensor in tower.state_dict().items()}
    if {name: tensor.shape for name, tensor in found.items()} != expected:
        raise CsrError(
            f"the vision tower of {policy.path} is not that of {path}: {_difference(found, expected)}",
            "name the scorer that the policy's tower comes from, or set scorer.vision=own",
        )
    tower.load_state_dict(found)


def tower_tensor(name: str) -> str:
    """Name a tensor of a LLaVA-like checkpoint as its vision tower does; empty for others."""
    _, separator, rest = name.rpartition("vision_tower.")
    return rest.removeprefix("vision_model.") if separator else ""


def _difference(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size]) -> str:
    if not found:
        return "the policy has none"
    name = next(n for n in [*expected, *found] if n not in found or found[n].shape != expected.get(n))
    mine, its = expected.get(name), found[name].shape if name in found else None
    return f"{name} is {tuple(its) if its else 'missing'} there and {tuple(mine) if mine else 'missing'} here"
