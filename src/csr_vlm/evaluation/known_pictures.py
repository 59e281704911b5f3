"""Describe what a report may know of a picture whose contents are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from PIL import Image


class KnownPicture(Protocol):
    """A picture whose contents are known."""

    @property
    def description(self) -> str:
        """List the contents, for readers who cannot see the picture."""
        ...

    @property
    def absent(self) -> frozenset[str]:
        """Name the kinds of object that are not in the picture."""
        ...

    def draw(self, scale: int) -> Image.Image:
        """Draw the picture, ``scale`` times its usual width and height."""
        ...

    def hallucinated(self, text: str) -> Sequence[str]:
        """List the kinds that a text names and that are not in the picture."""
        ...

    def unmentioned(self, text: str) -> Sequence[str]:
        """List the kinds that are in the picture and that a text does not name."""
        ...


TruthOf = Callable[[str], KnownPicture | None]
"""Maps the id of a prompt to its picture; None where the contents are not known."""


def no_truth(prompt_id: str) -> KnownPicture | None:
    """Know no picture, as for photographs."""
    del prompt_id
    return None
