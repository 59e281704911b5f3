"""Count the work that the model does, where it is done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Count the work done since the engine was created."""

    vision_encodes: int = 0
    """Images that went through the vision encoder."""
    prefill_tokens: int = 0
    """Tokens of prompts and prefixes that were prefilled, without padding."""
    decode_tokens: int = 0
    """Generated tokens that were fed back, one per row and step."""
    seconds_reading: float = 0.0
    """Time in which decoding waited for pictures to be decoded and processed."""
    forwards: int = 0
    """Forward passes of the language model."""

    def count_prefill(self, num_tokens: int) -> None:
        """Count a forward pass over prompts of ``num_tokens`` tokens in total."""
        self.prefill_tokens += num_tokens
        self.forwards += 1

    def count_decode(self, num_rows: int) -> None:
        """Count a forward pass over one token per row."""
        self.decode_tokens += num_rows
        self.forwards += 1
