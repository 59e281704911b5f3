"""Embed images and texts with models of open_clip, an optional dependency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from csr_vlm.config.schema import OneScorerConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.installing import install_command


class OpenClipEncoder:
    """Embed with an open_clip model in float32.

    ``open_clip:MODEL/PRETRAINED`` names one of ``open_clip.list_pretrained()``;
    ``open_clip:DIRECTORY`` holds ``open_clip_config.json`` and the weights, as
    ``open_clip.push_to_hf_hub`` writes them.

    Raises:
        CsrError: open_clip is not installed, or the model cannot be loaded.
    """

    def __init__(self, config: OneScorerConfig, device: str) -> None:
        try:
            import open_clip
        except (ImportError, RuntimeError) as error:
            raise CsrError(
                f"{config.path} needs open_clip, which cannot be imported: {error}",
                install_command("openclip"),
            ) from None
        target = config.path.removeprefix("open_clip:")
        is_local = Path(target).is_dir()
        model, _, pretrained = target.rpartition("/")
        name = f"local-dir:{target}" if is_local else model
        if not name:
            raise CsrError(
                f"{config.path} is neither a model nor a directory",
                "write open_clip:MODEL/PRETRAINED, such as open_clip:ViT-B-32/laion2b_s34b_b79k",
            )
        try:
            self._model, _, self._preprocess = open_clip.create_model_and_transforms(
                name, None if is_local else pretrained, device=device
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
        """Count the tokens of each text before truncation, special tokens included."""
        wrapped = getattr(self._tokenizer, "tokenizer", None)
        if wrapped is not None:  # a Hugging Face tokenizer
            return [len(ids) for ids in wrapped(list(texts), verbose=False)["input_ids"]]
        return [len(self._tokenizer.encode(text)) + 2 for text in texts]  # start and end of text

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts, truncated; return a tensor of shape (texts, width), not normalized."""
        features: torch.Tensor = self._model.encode_text(self._tokenizer(list(texts)).to(self._device))
        return features

    def embed_images(self, images: Sequence[Any]) -> torch.Tensor:
        """Embed RGB images; return a tensor of shape (images, width), not normalized."""
        pixels = torch.stack([self._preprocess(image) for image in images])
        features: torch.Tensor = self._model.encode_image(pixels.to(self._device))
        return features
