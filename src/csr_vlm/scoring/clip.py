"""Image-text relevance by CLIP: the cosine of eq. 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModel, AutoProcessor

from csr_vlm.batches import batched
from csr_vlm.config import ScorerConfig
from csr_vlm.data.images import load_image
from csr_vlm.errors import CsrError
from csr_vlm.loading import unloadable
from csr_vlm.records import Prompt


class ClipScorer:
    """Scores sentences against images: each image and each distinct sentence encoded once.

    Sentences longer than the text tower reads are cut, and counted in ``num_cut``.
    """

    def __init__(self, config: ScorerConfig, device: str, max_image_pixels: int = 50_000_000) -> None:
        self.name = config.name
        self.batch_size = config.batch_size
        self.num_cut = 0
        self._max_image_pixels = max_image_pixels
        self._images: dict[str, torch.Tensor] = {}
        try:
            self._model = AutoModel.from_pretrained(config.path, revision=config.revision, dtype=torch.float32)
            self._processor: Any = AutoProcessor.from_pretrained(config.path, revision=config.revision)
        except (OSError, ValueError, KeyError) as error:
            raise unloadable("scorer", config.path, error) from None
        if not hasattr(self._model, "get_text_features"):
            raise CsrError(f"{type(self._model).__name__} has no text tower", "scorer.path is a CLIP model")
        self._model = self._model.to(device).eval()
        self._max_tokens: int = self._model.config.text_config.max_position_embeddings

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        """Compute cos(F_I(image), F_T(sentence)) of each item, in -1..1, under the scorer's name."""
        if not items:
            return []
        self._embed_new_images([prompt for prompt, _ in items])
        sentences = sorted({sentence for _, sentence in items}, key=lambda text: (len(text), text))
        texts = dict(zip(sentences, self._embed_texts(sentences), strict=True))
        images = torch.stack([self._images[prompt.prompt_id] for prompt, _ in items])
        cosines = (images * torch.stack([texts[sentence] for _, sentence in items])).sum(dim=-1)
        return [{self.name: value} for value in cosines.tolist()]

    def forget(self) -> None:
        """Drop what is kept about images; call it between work items."""
        self._images.clear()

    @torch.inference_mode()
    def _embed_new_images(self, prompts: Sequence[Prompt]) -> None:
        new = {prompt.prompt_id: prompt for prompt in prompts if prompt.prompt_id not in self._images}
        for chunk in batched(new.values(), self.batch_size):
            pictures = [load_image(prompt.image, self._max_image_pixels) for prompt in chunk]
            pixels = self._processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
            features = self._model.get_image_features(pixel_values=pixels.to(self._model.device)).pooler_output
            for prompt, row in zip(chunk, torch.nn.functional.normalize(features, dim=-1).cpu(), strict=True):
                self._images[prompt.prompt_id] = row

    @torch.inference_mode()
    def _embed_texts(self, sentences: Sequence[str]) -> list[torch.Tensor]:
        rows: list[torch.Tensor] = []
        for chunk in batched(sentences, self.batch_size):
            full = self._processor.tokenizer(chunk)["input_ids"]
            self.num_cut += sum(len(ids) > self._max_tokens for ids in full)
            tokens = self._processor.tokenizer(
                chunk, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
            ).to(self._model.device)
            features = self._model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
            rows += torch.nn.functional.normalize(features, dim=-1).cpu()
        return rows
