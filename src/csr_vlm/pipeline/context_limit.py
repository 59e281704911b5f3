"""Drop prompts that are longer than the model's context, before the first search."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

from PIL import Image

from csr_vlm.config.schema import RunConfig
from csr_vlm.core.records import Prompt
from csr_vlm.data.prompts import InputReport

if TYPE_CHECKING:
    from csr_vlm.models.encoding import PromptEncoder

TOO_LONG = "longer than the model's context"
_SHORT_TEXT = 1000
"""Characters of a question that is not measured."""
_SMALL_PICTURE = 4_000_000
"""Pixels of a picture that is not measured: at most 5,100 tokens in Qwen-VL, whose context is 32,768 or more."""


def within_context(prompts: Iterable[Prompt], config: RunConfig, report: InputReport) -> Iterator[Prompt]:
    """Yield the prompts that leave room for a response; drop and count the others.

    The processor is loaded, and a prompt is encoded, only where a long question or a large picture makes it necessary.

    Args:
        prompts: Accepted prompts.
        config: Names the model and the longest response.
        report: Receives the dropped prompts.
    """
    limit = _ContextLimit(config)
    for prompt in prompts:
        if _may_be_long(prompt) and (excess := limit.excess(prompt)) > 0:
            report.accepted -= 1
            report.drop(TOO_LONG, f"prompt {prompt.prompt_id}", f"by {excess} tokens, with room for a sentence")
            continue
        yield prompt


def _may_be_long(prompt: Prompt) -> bool:
    if len(prompt.text) > _SHORT_TEXT:
        return True
    with Image.open(prompt.image) as image:
        return image.width * image.height > _SMALL_PICTURE


class _ContextLimit:
    """Measure prompts against the context of a model, which is loaded with the first of them."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    @cached_property
    def _encoder(self) -> PromptEncoder:
        from csr_vlm.models.loading import load_prompt_encoder

        return load_prompt_encoder(self._config.model, self._config.data.max_image_pixels)

    def excess(self, prompt: Prompt) -> int:
        """Return the tokens by which a prompt and one sentence exceed the context; negative if they fit."""
        encoder = self._encoder
        context: int = encoder.config.get_text_config().max_position_embeddings
        length: int = encoder.process(prompt)["input_ids"].shape[1]
        return length + self._config.method.search.max_sentence_tokens - context
