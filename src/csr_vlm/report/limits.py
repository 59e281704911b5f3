"""How much of a run a page shows: enough to judge it, little enough to send."""

from __future__ import annotations

from dataclasses import dataclass, fields

MOST_BYTES = 14_000_000
"""A page larger than this is made again from a smaller sample; 15 MB is what is promised."""
MOST_CHARS = 4_000
"""Of one text. A response is a paragraph; what is longer went wrong, and its start shows how."""


@dataclass(frozen=True)
class Sample:
    """The most that is shown of each kind."""

    prompts: int = 60
    """With their pairs and search trees."""
    compared: int = 24
    """Responses before and after."""
    iterations: int = 6
    """Of one prompt."""

    def halved(self) -> Sample:
        """Half of everything, one at least."""
        return Sample(**{part.name: max(1, getattr(self, part.name) // 2) for part in fields(self)})


def cut(text: str, most: int = MOST_CHARS) -> str:
    """Shorten a text that is too long to be read, and say so.

    Example:
        >>> cut("abcdef", 3)
        'abc … (3 characters left out)'
    """
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most} characters left out)"
