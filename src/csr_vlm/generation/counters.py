"""What the model was made to do, counted where it is done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Work since the engine was made."""

    vision_encodes: int = 0
    """Images that went through the vision encoder."""
    prefill_tokens: int = 0
    """Tokens of prompts and prefixes that were read, padding not counted."""
    decode_tokens: int = 0
    """Tokens fed back, one a row and step."""
    forwards: int = 0
    """Calls of the language model."""

    def read(self, num_tokens: int) -> None:
        """Count a forward pass over prompts."""
        self.prefill_tokens += num_tokens
        self.forwards += 1

    def decode(self, num_rows: int) -> None:
        """Count a forward pass over one token a row."""
        self.decode_tokens += num_rows
        self.forwards += 1
