"""Compute cosines of image and text embeddings (eq. 3), embedding each image and each sentence once."""

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
from csr_vlm.scoring.clauses import split_clauses

_MAX_LENGTH_RATIO = 1.3
"""Largest ratio of the lengths, in tokens, of two texts in a batch."""


class Encoder(Protocol):
    """Define an image and a text encoder with a common embedding space, such as CLIP's."""

    max_tokens: int
    """Most tokens that the text encoder accepts, special tokens included."""

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of each text before truncation, special tokens included."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts, truncated to ``max_tokens``; return a tensor of shape (texts, width), not normalized."""
        ...

    def embed_images(self, images: Sequence[Any]) -> torch.Tensor:
        """Embed RGB images; return a tensor of shape (images, width), not normalized."""
        ...


class EmbeddingScorer:
    """Score sentences against images by the cosine of their embeddings (a Scorer).

    Args:
        config: Configuration of the scorer; ``long_sentences`` selects how long sentences are scored.
        encoder: Encoder of images and texts.
        max_image_pixels: Larger images are rejected without decoding.
    """

    def __init__(self, config: OneScorerConfig, encoder: Encoder, max_image_pixels: int) -> None:
        self.name = config.name
        self._config = config
        self._encoder = encoder
        self._max_image_pixels = max_image_pixels
        self._images: dict[str, torch.Tensor] = {}

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        """Compute cos(F_I(image), F_T(sentence)) of each item, in -1..1.

        A sentence over the text encoder's limit gets the mean cosine of its clauses
        (``long_sentences: split``) or the cosine of its truncated text (``cut``).
        """
        if not items:
            return []
        self._embed_new_images({prompt.image: prompt for prompt, _ in items})
        texts = self._embed_sentences({sentence for _, sentence in items})
        images = torch.stack([self._images[prompt.image] for prompt, _ in items])
        cosines = (images * torch.stack([texts[sentence] for _, sentence in items])).sum(dim=-1)
        return [{self.name: value} for value in cosines.tolist()]

    def similarities(self, prompt: Prompt, others: Sequence[Prompt]) -> list[float]:
        """Return the cosines of the embedding of a prompt's image with those of other prompts' images."""
        self._embed_new_images({each.image: each for each in (prompt, *others)})
        images = torch.stack([self._images[other.image] for other in others])
        similar: list[float] = (images @ self._images[prompt.image]).tolist()
        return similar

    def forget(self) -> None:
        """Drop the image embeddings."""
        self._images.clear()

    def num_over_length(self, sentences: Iterable[str]) -> int:
        """Count the sentences that exceed the text encoder's limit; repeated sentences count each time."""
        counts = (n for chunk in batched(sentences, 4096) for n in self._encoder.count_tokens(chunk))
        return sum(count > self._encoder.max_tokens for count in counts)

    @torch.inference_mode()
    def _embed_new_images(self, prompts: Mapping[str, Prompt]) -> None:
        new = [path for path in prompts if path not in self._images]
        for chunk in batched(new, self._config.batch_size):
            images = [load_prompt_image(prompts[path], self._max_image_pixels) for path in chunk]
            rows = normalize(self._encoder.embed_images(images).float(), dim=-1).cpu()
            self._images |= dict(zip(chunk, rows, strict=True))

    @torch.inference_mode()
    def _embed_sentences(self, sentences: Iterable[str]) -> dict[str, torch.Tensor]:
        """Map each sentence to a vector of shape (width,) whose dot product with an image embedding is its cosine."""
        ordered = sorted(sentences)
        lengths = dict(zip(ordered, self._encoder.count_tokens(ordered), strict=True))
        pieces = {sentence: self._pieces(sentence, lengths[sentence]) for sentence in ordered}
        vectors: dict[str, torch.Tensor] = {}
        for chunk in self._batches_by_length({piece for split in pieces.values() for piece in split}):
            rows = normalize(self._encoder.embed_texts(chunk).float(), dim=-1).cpu()
            vectors |= dict(zip(chunk, rows, strict=True))
        # The mean of unit vectors is not normalized again: its dot product is the mean of the cosines.
        return {s: torch.stack([vectors[piece] for piece in split]).mean(dim=0) for s, split in pieces.items()}

    def _batches_by_length(self, texts: Iterable[str]) -> Iterator[list[str]]:
        """Batch texts of similar length, so that little of a batch is padding.

        Which texts are in a batch depends on all texts given, and with it the rounding of the embeddings.
        """
        ordered = sorted(texts)
        counts = dict(zip(ordered, self._encoder.count_tokens(ordered), strict=True))
        ordered.sort(key=lambda text: (counts[text], text))
        for _, similar in groupby(ordered, key=lambda text: int(math.log(counts[text], _MAX_LENGTH_RATIO))):
            yield from batched(similar, self._config.batch_size)

    def _pieces(self, sentence: str, length: int) -> list[str]:
        limit = self._encoder.max_tokens
        if length <= limit or self._config.long_sentences == "cut":
            return [sentence]
        return split_clauses(sentence, lambda text: self._encoder.count_tokens([text])[0] <= limit)
