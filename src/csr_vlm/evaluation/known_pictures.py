"""Define the interface through which reports learn the contents of a picture, where they are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from PIL import Image


class KnownPicture(Protocol):
    """Describe a picture whose contents are known, such as a drawn scene."""

    @property
    def description(self) -> str:
        """Return a text that lists the contents, for readers who cannot see the picture."""
        ...

    @property
    def absent(self) -> frozenset[str]:
        """Return the kinds of object that are not in the picture."""
        ...

    def draw(self, scale: int) -> Image.Image:
        """Draw the picture, ``scale`` times its usual width and height."""
        ...

    def hallucinated(self, text: str) -> Sequence[str]:
        """List the kinds that a text names but that are not in the picture."""
        ...

    def unmentioned(self, text: str) -> Sequence[str]:
        """List the kinds that are in the picture but that a text does not name."""
        ...


TruthOf = Callable[[str], KnownPicture | None]
"""Maps a prompt id to its picture; None where the contents are not known."""


def no_truth(prompt_id: str) -> KnownPicture | None:
    """Return None, as for photographs, whose contents are not known."""
    del prompt_id
    return None
