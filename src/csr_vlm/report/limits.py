"""Limit how much of a run a page shows: enough to judge the run, small enough to send."""

from __future__ import annotations

from dataclasses import dataclass, fields

MAX_BYTES = 14_000_000
"""Largest report; a larger one is rendered again with a smaller sample. The documentation promises 15 MB."""
MAX_CHARS = 4_000
"""Longest text. A longer response is degenerate, and its beginning shows how."""


@dataclass(frozen=True)
class Sample:
    """Set the largest number of items of each kind on a page."""

    prompts: int = 60
    """Prompts with their pairs and search trees."""
    compared: int = 24
    """Prompts with responses before and after training."""
    iterations: int = 6
    """Iterations per prompt."""

    def halved(self) -> Sample:
        """Return a sample of half the size, with at least one item of each kind."""
        return Sample(**{field.name: max(1, getattr(self, field.name) // 2) for field in fields(self)})


def shorten(text: str, max_chars: int = MAX_CHARS) -> str:
    """Cut a text that is too long and append the number of omitted characters.

    Example:
        >>> shorten("abcdef", 3)
        'abc … (3 characters omitted)'
    """
    if len(text) <= max_chars:
        return text
    return f"{text[:max_chars]} … ({len(text) - max_chars} characters omitted)"
