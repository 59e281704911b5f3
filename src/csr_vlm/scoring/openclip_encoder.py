"""Models of open_clip, an optional dependency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from csr_vlm.config.schema import OneScorerConfig
from csr_vlm.core.errors import CsrError


class OpenClipEncoder:
    """The towers of an open_clip model in float32.

    ``open_clip:MODEL/PRETRAINED`` names one of ``open_clip.list_pretrained()``;
    ``open_clip:DIRECTORY`` holds ``open_clip_config.json`` and the weights, as
    ``open_clip.push_to_hf_hub`` writes them.
    """

    def __init__(self, config: OneScorerConfig, device: str) -> None:
        try:
            import open_clip
        except (ImportError, RuntimeError) as error:
            raise CsrError(
                f"{config.path} needs open_clip, which cannot be imported: {error}",
                "pip install 'csr-vlm[openclip]'",
            ) from None
        where = config.path.removeprefix("open_clip:")
        local = Path(where).is_dir()
        model, _, pretrained = where.rpartition("/")
        name = f"local-dir:{where}" if local else model
        if not name:
            raise CsrError(
                f"{config.path} names no model and no directory", "write open_clip:ViT-B-32/laion2b_s34b_b79k"
            )
        try:
            self._model, _, self._preprocess = open_clip.create_model_and_transforms(
                name, None if local else pretrained, device=device
            )
            self._tokenizer: Any = open_clip.get_tokenizer(name)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CsrError(
                f"the scorer {config.path} cannot be loaded: {reason}", "open_clip.list_pretrained() lists models"
            ) from None
        self._model.eval()
        self._device = device
        self.max_tokens: int = self._tokenizer.context_length

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        wrapped = getattr(self._tokenizer, "tokenizer", None)
        if wrapped is not None:  # a Hugging Face tokenizer
            return [len(ids) for ids in wrapped(list(texts), verbose=False)["input_ids"]]
        return [len(self._tokenizer.encode(text)) + 2 for text in texts]  # begin and end

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        features: torch.Tensor = self._model.encode_text(self._tokenizer(list(texts)).to(self._device))
        return features

    def embed_images(self, images: Sequence[Any]) -> torch.Tensor:
        pixels = torch.stack([self._preprocess(image) for image in images])
        features: torch.Tensor = self._model.encode_image(pixels.to(self._device))
        return features
