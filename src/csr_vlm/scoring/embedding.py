"""Cosines of image and text embeddings (eq. 3), each image and each sentence embedded once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from torch.nn.functional import normalize

from csr_vlm.config.schema import OneScorerConfig
from csr_vlm.core.batching import batched
from csr_vlm.core.records import Prompt
from csr_vlm.data.images import load_prompt_image
from csr_vlm.scoring.clauses import clauses

_STRETCH = 1.3
"""Texts of one batch differ in length by no more than this factor."""


class Encoder(Protocol):
    """A pair of towers into one space."""

    max_tokens: int
    """What the text tower reads, its special tokens included."""

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Count tokens before any is cut, special ones included."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts, cut at ``max_tokens``: of shape (texts, width), not normalised."""
        ...

    def embed_images(self, images: Sequence[Any]) -> torch.Tensor:
        """Embed RGB pictures: of shape (images, width), not normalised."""
        ...


class EmbeddingScorer:
    """Scores sentences against images by the cosine of their embeddings."""

    def __init__(self, config: OneScorerConfig, encoder: Encoder, max_image_pixels: int) -> None:
        self.name = config.name
        self._config = config
        self._encoder = encoder
        self._max_image_pixels = max_image_pixels
        self._images: dict[str, torch.Tensor] = {}

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        """Compute cos(F_I(image), F_T(sentence)) of each item, in -1..1.

        A sentence over the text tower's limit is worth the mean cosine of its clauses
        (``long_sentences: split``) or the cosine of what the tower reads of it (``cut``).
        """
        if not items:
            return []
        self._embed_new_images({prompt.image: prompt for prompt, _ in items})
        texts = self._embed_sentences({sentence for _, sentence in items})
        images = torch.stack([self._images[prompt.image] for prompt, _ in items])
        cosines = (images * torch.stack([texts[sentence] for _, sentence in items])).sum(dim=-1)
        return [{self.name: value} for value in cosines.tolist()]

    def forget(self) -> None:
        self._images.clear()

    def num_over_length(self, sentences: Iterable[str]) -> int:
        """Count the sentences that the text tower cannot read whole, repeated ones again."""
        counts = (n for chunk in batched(sentences, 4096) for n in self._encoder.count_tokens(chunk))
        return sum(count > self._encoder.max_tokens for count in counts)

    @torch.inference_mode()
    def _embed_new_images(self, prompts: Mapping[str, Prompt]) -> None:
        new = [path for path in prompts if path not in self._images]
        for chunk in batched(new, self._config.batch_size):
            pictures = [load_prompt_image(prompts[path], self._max_image_pixels) for path in chunk]
            rows = normalize(self._encoder.embed_images(pictures).float(), dim=-1).cpu()
            self._images |= dict(zip(chunk, rows, strict=True))

    @torch.inference_mode()
    def _embed_sentences(self, sentences: Iterable[str]) -> dict[str, torch.Tensor]:
        """Map each sentence to the vector whose product with an image is its cosine."""
        ordered = sorted(sentences)
        lengths = dict(zip(ordered, self._encoder.count_tokens(ordered), strict=True))
        pieces = {sentence: self._pieces(sentence, lengths[sentence]) for sentence in ordered}
        vectors: dict[str, torch.Tensor] = {}
        for chunk in self._of_like_length({piece for own in pieces.values() for piece in own}):
            rows = normalize(self._encoder.embed_texts(chunk).float(), dim=-1).cpu()
            vectors |= dict(zip(chunk, rows, strict=True))
        # The mean of unit vectors, not made a unit again: its product is the mean of the cosines.
        return {s: torch.stack([vectors[piece] for piece in own]).mean(dim=0) for s, own in pieces.items()}

    def _of_like_length(self, texts: Iterable[str]) -> Iterator[list[str]]:
        """Batch texts so that little of a batch is padding; which batch a text is in depends on its company."""
        ordered = sorted(texts)
        counts = dict(zip(ordered, self._encoder.count_tokens(ordered), strict=True))
        ordered.sort(key=lambda text: (counts[text], text))
        for _, alike in groupby(ordered, key=lambda text: int(math.log(counts[text], _STRETCH))):
            yield from batched(alike, self._config.batch_size)

    def _pieces(self, sentence: str, length: int) -> list[str]:
        limit = self._encoder.max_tokens
        if length <= limit or self._config.long_sentences == "cut":
            return [sentence]
        return clauses(sentence, lambda text: self._encoder.count_tokens([text])[0] <= limit)
