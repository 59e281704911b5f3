"""Check prompts with a model's processor, before any weights are needed.

What the processor refuses (an extreme aspect ratio, its own placeholder in the text) and what does not fit in the
model's context would end a search hours later.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from copy import deepcopy
from functools import cached_property
from typing import Any

from PIL import Image

from csr_vlm.config.schema import RunConfig
from csr_vlm.core.errors import reason_of
from csr_vlm.core.records import Prompt
from csr_vlm.data.rows import BadRow
from csr_vlm.models.encoding import PromptEncoder
from csr_vlm.models.loading import load_prompt_encoder

REFUSED = "refused by the model's processor"
TOO_LONG = "longer than the model's context"


class ProcessorCheck:
    """Put prompts through a model's processor; see :class:`csr_vlm.data.checking.ModelCheck`.

    Args:
        encoder: Encodes the model's prompts; every thread uses a copy of its processor.
        room: Number of tokens that must fit in the context after a prompt.
        max_tokens: Limit of the context besides the model's own.
    """

    def __init__(self, encoder: PromptEncoder, room: int = 1, max_tokens: int | None = None) -> None:
        # The encoder itself may process prompts in another thread while threads copy this one.
        self._encoder = _copy_of(encoder)
        self._room = room
        self._copies = threading.local()
        limits = (context_length(encoder.config), max_tokens)
        self._context = min((limit for limit in limits if limit), default=None)

    @classmethod
    def of_run(cls, config: RunConfig) -> ProcessorCheck:
        """Load the processor of a run's model; one sentence must fit after each prompt.

        Raises:
            CsrError: The processor cannot be loaded.
        """
        max_tokens = config.generation.vllm.get("max_model_len")
        return cls(
            load_prompt_encoder(config.model, config.data.max_image_pixels),
            config.method.search.max_sentence_tokens,
            max_tokens if isinstance(max_tokens, int) else None,
        )

    @cached_property
    def placeholders(self) -> Sequence[str]:
        """Return the model's own placeholders."""
        return self._encoder.placeholders

    def require(self, text: str, image: Image.Image, responses: Sequence[str] = ()) -> None:
        """Verify that the processor accepts a prompt, and that it fits in the context with each of its responses.

        Raises:
            BadRow: It does not.
        """
        encoder = self._copy()
        try:
            num_tokens = int(encoder.process_image(text, image)["input_ids"].shape[1])
        except Exception as error:  # Processors raise anything.
            raise BadRow(REFUSED, " ".join(f"{type(error).__name__}: {reason_of(error)}".split())[:200]) from None
        if set(encoder.tokenizer(text, add_special_tokens=False)["input_ids"]) & set(encoder.image_token_ids):
            raise BadRow("placeholder of an image in the text")
        lengths = [len(encoder.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in responses]
        needed = num_tokens + max(lengths, default=self._room)
        if self._context is not None and needed > self._context:
            rest = "its response" if responses else "a sentence"
            raise BadRow(TOO_LONG, f"{num_tokens:,} tokens; with {rest} {needed:,} of at most {self._context:,}")

    def problem_of(self, prompt: Prompt) -> BadRow | None:
        """Return why the processor refuses a prompt whose image was checked; None if it accepts it.

        Raises:
            CsrError: The image was deleted or changed since.
        """
        try:
            self.require(prompt.text, self._encoder.image(prompt))
        except BadRow as error:
            return error
        return None

    def _copy(self) -> PromptEncoder:
        """Return this thread's copy of the encoder: processors are not safe to share."""
        if not hasattr(self._copies, "encoder"):
            self._copies.encoder = _copy_of(self._encoder)
        copied: PromptEncoder = self._copies.encoder
        return copied


def _copy_of(encoder: PromptEncoder) -> PromptEncoder:
    return PromptEncoder(
        encoder.config, encoder.generation_config, deepcopy(encoder.processor), encoder.max_image_pixels
    )


def context_length(config: Any) -> int | None:
    """Return the number of positions of a model's language model; None if its configuration does not say."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None
