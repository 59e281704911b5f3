"""Choose how many rows a search decodes at once, from the memory that is free beside the model.

A row is a candidate that decodes. What rows store grows with their number: the keys and values of the prompts in
progress, once for each prompt; those of each group of siblings, its path once and a sentence for each sibling; and the
logits of a step. ``generation.max_rows: auto`` is the largest number of rows for which all of that fits a GPU with
responses of the greatest length, beside one prefill pass. The engine calls :func:`row_budget` with the memory that it
measures, ``csr check`` with that of the GPU that a run is planned for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from csr_vlm.config.schema import SearchConfig
from csr_vlm.core.batching import PROMPTS_PER_FULL_BEAM
from csr_vlm.models.architecture import Architecture

CPU_ROWS = 512
"""Rows on a CPU, whose memory other programs share."""
MAX_PREFILL_TOKENS = 8192
"""Most tokens of prompts prefilled in one forward pass."""
_MOST_ROWS = 1024
"""With more, a step of a large model is bound by arithmetic or by the host's work on each row: it gains nothing."""
_USABLE = 0.9
"""Share of the free memory that is planned for; the rest is for fragments and temporary tensors."""
_LOGIT_COPIES = 4
"""Float32 copies of a step's logits: raw, log-probabilities, sorted, masked."""


def rows_on_cpu(max_rows: int | Literal["auto"]) -> int:
    """Return ``generation.max_rows``, or the rows of a CPU if that is ``auto``: no memory is measured there."""
    return CPU_ROWS if max_rows == "auto" else max_rows


@dataclass(frozen=True)
class RowShape:
    """Describe the rows of a search by what they store."""

    candidates: int
    """Rows of a group of siblings."""
    beam: int
    """Groups of a prompt in a full round."""
    path_tokens: float
    """Tokens of the partial response that a group continues."""
    sentence_tokens: float
    """Tokens of a candidate."""
    prompts_per_beam: int = PROMPTS_PER_FULL_BEAM
    """Prompts in progress for each full beam that the rows have room for."""

    @classmethod
    def longest(cls, search: SearchConfig) -> RowShape:
        """Return the shape of rows at the end of the longest response that the settings allow.

        Example:
            >>> RowShape.longest(SearchConfig(max_sentences=8, max_sentence_tokens=70)).path_tokens
            490
        """
        path = (search.max_sentences - 1) * search.max_sentence_tokens
        if search.max_response_chars is not None:
            path = min(path, search.max_response_chars)  # a token has a character or more
        return cls(search.num_candidates, search.keep_top + search.keep_bottom, path, search.max_sentence_tokens)

    def num_prompts(self, rows: int) -> int:
        """Return the prompts in progress, so that sentences of different lengths keep the rows busy."""
        return max(self.prompts_per_beam * rows // (self.beam * self.candidates), 1)

    def stored_tokens(self, rows: int, prompt_tokens: float) -> float:
        """Return the tokens whose keys and values are stored.

        Example: 16 rows of 4 siblings are 4 groups of a path of 10 tokens and 4 sentences of 5, and 2 prompts of 100.
            >>> RowShape(candidates=4, beam=4, path_tokens=10, sentence_tokens=5).stored_tokens(16, 100)
            320.0
        """
        group = self.path_tokens + self.candidates * self.sentence_tokens
        return self.num_prompts(rows) * prompt_tokens + rows / self.candidates * group

    def row_bytes(self, rows: int, prompt_tokens: float, architecture: Architecture, bytes_per_value: float) -> float:
        """Return the bytes of what rows store, and of the logits of a step."""
        cache = self.stored_tokens(rows, prompt_tokens) * architecture.cache_bytes(bytes_per_value)
        return cache + 4.0 * _LOGIT_COPIES * rows * architecture.vocabulary


def row_budget(
    free: float, shape: RowShape, prompt_tokens: float, architecture: Architecture, bytes_per_value: float
) -> int:
    """Return the most rows that fit the free memory of a GPU: a multiple of the candidates of a group, at least that.

    Args:
        free: Bytes that are free with all weights loaded.
        shape: What the rows store at most.
        prompt_tokens: Tokens of a long prompt.
        architecture: The policy.
        bytes_per_value: Bytes of a key or value.
    """
    room = _USABLE * free - architecture.pass_bytes(MAX_PREFILL_TOKENS, bytes_per_value)
    most = max(_MOST_ROWS // shape.candidates, 1) * shape.candidates
    fitting = (
        rows
        for rows in range(most, 0, -shape.candidates)
        if shape.row_bytes(rows, prompt_tokens, architecture, bytes_per_value) <= room
    )
    return next(fitting, shape.candidates)
