"""Encode prompts as a model's processor does, and batch them with responses.

Generation, teacher forcing and training encode prompts with :class:`PromptEncoder` and build
batches with :func:`batch_rows`, so all of them give the model the same inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from csr_vlm.config.schema import DataConfig
from csr_vlm.core.records import Prompt
from csr_vlm.data.images import load_prompt_image
from csr_vlm.models.families import Family, family_of, image_token_ids, placeholder_tokens

MAX_IMAGE_PIXELS: int = DataConfig.model_fields["max_image_pixels"].default
"""Default limit of an image's width times height."""


@dataclass(frozen=True)
class EncodedPrompt:
    """Hold one prompt as model inputs, on the CPU."""

    input_ids: torch.Tensor
    """Token ids of shape (tokens,), with image placeholders expanded."""
    positions: torch.Tensor
    """Token positions of shape (tokens,), or of shape (3, tokens) for M-RoPE."""
    per_token: dict[str, torch.Tensor]
    """Other tensors of shape (tokens,), such as token type ids."""
    per_image: dict[str, torch.Tensor]
    """Pixel values and related tensors, which batches concatenate along the first dimension."""
    response_token_type: int = 0
    """Value of the per-token tensors for response tokens."""
    features: tuple[torch.Tensor, ...] | None = None
    """Image features of shape (image tokens, width), then those for deeper layers, of the same shape."""

    @property
    def position_delta(self) -> int:
        """Return the position of the response's first token minus the number of prompt tokens."""
        return int(self.positions.max()) + 1 - len(self.input_ids)


@dataclass
class _ProcessedImage:
    """Hold an image, and what a processor's image processor made of it."""

    path: str
    image: Any
    results: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def remembered(self, processor: Any) -> Iterator[None]:
        """Make a processor use the results of earlier calls."""
        image_processor = processor.image_processor
        processor.image_processor = _RememberingImageProcessor(image_processor, self.results)
        try:
            yield
        finally:
            processor.image_processor = image_processor


class _RememberingImageProcessor:
    """Call an image processor once per set of options; the image is always the same."""

    def __init__(self, image_processor: Any, results: dict[str, Any]) -> None:
        self._image_processor = image_processor
        self._results = results

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        options = repr(sorted((key, value) for key, value in kwargs.items() if key != "images"))
        if options not in self._results:
            self._results[options] = self._image_processor(*args, **kwargs)
        return copy(self._results[options])  # Processors remove entries.

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy and pickle look for such names before there is an image processor
            raise AttributeError(name)
        return getattr(self._image_processor, name)


@dataclass
class PromptEncoder:
    """Format and tokenize prompts for a model; this needs its configuration but no weights."""

    config: Any
    generation_config: Any
    processor: Any
    max_image_pixels: int = MAX_IMAGE_PIXELS
    eos_ids: frozenset[int] = field(init=False, repr=False)
    """Token ids that end a response."""
    _last: _ProcessedImage | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        eos = self.generation_config.eos_token_id
        if eos is None:
            eos = self.tokenizer.eos_token_id
        self.eos_ids = frozenset(eos if isinstance(eos, list) else [eos])

    @property
    def tokenizer(self) -> Any:
        """Return the processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def family(self) -> Family:
        """Return the model's family."""
        return family_of(self.config)

    @property
    def image_token_ids(self) -> list[int]:
        """Return the ids that may not occur in a response; see :func:`csr_vlm.models.families.image_token_ids`."""
        return image_token_ids(self.config, self.processor)

    @cached_property
    def placeholders(self) -> tuple[str, ...]:
        """Return the tokens that stand for images, videos or their borders; a question must not contain them."""
        return placeholder_tokens(self.config, self.processor)

    def image(self, prompt: Prompt) -> Any:
        """Load the prompt's image.

        Raises:
            CsrError: The image was deleted or changed since it was checked.
        """
        return load_prompt_image(prompt, self.max_image_pixels)

    def process(self, prompt: Prompt) -> Any:
        """Load the image, apply the chat template, and return the processor's output for a batch of one.

        Several prompts in a row about one image load and process it once.

        Raises:
            CsrError: The image was deleted or changed since it was checked.
        """
        if self._last is None or self._last.path != prompt.image:
            self._last = _ProcessedImage(prompt.image, self.image(prompt))
        with self._last.remembered(self.processor):
            return self.process_image(prompt.text, self._last.image)

    def process_image(self, question: str, image: Any) -> Any:
        """Apply the chat template to a question, and return the processor's output for a batch of one."""
        text, add_special_tokens = self.format_prompt(question)
        return self.processor(images=[image], text=[text], return_tensors="pt", add_special_tokens=add_special_tokens)

    def short_ids(self, prompt: Prompt) -> list[int]:
        """Tokenize a prompt with one placeholder token per image, for engines that expand it themselves."""
        text, add_special_tokens = self.format_prompt(prompt.text)
        ids: list[int] = self.tokenizer(text, add_special_tokens=add_special_tokens).input_ids
        return ids

    def format_prompt(self, text: str) -> tuple[str, bool]:
        """Return the formatted prompt, and whether the tokenizer has to add special tokens."""
        if not self.family.chat:
            formatted = f"{self.processor.image_token}{text}"
        else:
            content = [{"type": "image"}, {"type": "text", "text": text}]
            message = {"role": "user", "content": content}
            formatted = self.processor.apply_chat_template([message], add_generation_prompt=True)
        bos = self.tokenizer.bos_token
        # Some chat templates contain the BOS token.
        return formatted, not (bos and formatted.startswith(bos))


def batch_rows(
    encoded: Sequence[EncodedPrompt],
    continuations: Sequence[Sequence[int]],
    pad_id: int,
    padding_side: Literal["left", "right"],
) -> dict[str, torch.Tensor]:
    """Concatenate each prompt with its continuation and pad the rows to one width.

    Args:
        encoded: Prompts, one per row.
        continuations: Token ids that follow each prompt.
        pad_id: Token id for the padding of ``input_ids``; all else is padded with 0.
        padding_side: Side on which rows are padded.

    Returns:
        ``input_ids``, ``attention_mask``, ``position_ids`` and the per-token tensors, each of
        shape (rows, width); with M-RoPE, ``position_ids`` are of shape (3, rows, width).

    Example:
        >>> prompts = [EncodedPrompt(torch.tensor(ids), torch.arange(len(ids)), {}, {}) for ids in ([5, 6, 7], [5])]
        >>> batch = batch_rows(prompts, [[8], [9, 2]], pad_id=0, padding_side="left")
        >>> batch["input_ids"]
        tensor([[5, 6, 7, 8],
                [0, 5, 9, 2]])
        >>> batch["attention_mask"]
        tensor([[1, 1, 1, 1],
                [0, 1, 1, 1]])
        >>> batch["position_ids"]
        tensor([[0, 1, 2, 3],
                [0, 0, 1, 2]])
    """
    rows = [extend(item, ids) for item, ids in zip(encoded, continuations, strict=True)]
    width = max(len(row["input_ids"]) for row in rows)

    def stack(values: Sequence[torch.Tensor], padding: int, dim: int = 0) -> torch.Tensor:
        return stack_padded(values, width, padding, padding_side, dim)

    return {
        "input_ids": stack([row["input_ids"] for row in rows], pad_id),
        "attention_mask": stack([torch.ones_like(row["input_ids"]) for row in rows], 0),
        "position_ids": stack([row["positions"] for row in rows], 0, dim=-2),
        **{key: stack([row[key] for row in rows], 0) for key in encoded[0].per_token},
    }


def extend(item: EncodedPrompt, continuation: Sequence[int]) -> dict[str, torch.Tensor]:
    """Append a response's token ids to a prompt; return ``input_ids``, ``positions`` and the per-token tensors."""
    length = len(continuation)
    response = torch.arange(length) + len(item.input_ids) + item.position_delta
    return {
        "input_ids": torch.cat([item.input_ids, torch.tensor(list(continuation), dtype=torch.long)]),
        "positions": torch.cat([item.positions, response.expand(*item.positions.shape[:-1], -1)], dim=-1),
        **{
            key: torch.cat([value, value.new_full((length,), item.response_token_type)])
            for key, value in item.per_token.items()
        },
    }


def stack_padded(
    rows: Sequence[torch.Tensor],
    width: int,
    value: int,
    padding_side: Literal["left", "right"] = "right",
    dim: int = 0,
) -> torch.Tensor:
    """Pad the last dimension of tensors to a width, and stack them along a new dimension."""

    def pad(row: torch.Tensor) -> torch.Tensor:
        gap = width - row.shape[-1]
        return torch.nn.functional.pad(row, (gap, 0) if padding_side == "left" else (0, gap), value=value)

    return torch.stack([pad(row) for row in rows], dim=dim)


def image_tensors(encoded: Sequence[EncodedPrompt]) -> dict[str, torch.Tensor]:
    """Concatenate the tensors of the prompts' images along the first dimension.

    If images differ in size or in their number of tiles, smaller tensors are padded with zeros
    at the end, as processors do within a batch.

    Example:
        >>> prompts = [
        ...     EncodedPrompt(torch.tensor([5]), torch.arange(1), {}, {"pixel_values": torch.full((1, size), 1.0)})
        ...     for size in (2, 3)
        ... ]
        >>> image_tensors(prompts)["pixel_values"]
        tensor([[1., 1., 0.],
                [1., 1., 1.]])
    """
    return {key: _concatenate_padded([item.per_image[key] for item in encoded]) for key in encoded[0].per_image}


def _concatenate_padded(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        gaps = [(0, target - size) for target, size in zip(shape, tensor.shape[1:], strict=True)]
        # torch pads the last dimension first.
        padded.append(torch.nn.functional.pad(tensor, [side for gap in reversed(gaps) for side in gap]))
    return torch.cat(padded)
