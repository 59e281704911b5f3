"""A pair on its way to another program's file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Pair
from csr_vlm.data.formats.rows import Row, said
from csr_vlm.store.files import read_json

ASSISTANT = ("gpt", "assistant")
Responses = tuple[str, str]
"""(chosen, rejected)."""


@dataclass(frozen=True)
class Item:
    """One pair and how its image is referred to."""

    pair: Pair
    image: str
    """Path to write, absolute or relative to the file's folder."""
    embedded: bool
    """Whether the image goes into the file itself, where the format can hold it."""
    origin: str
    """The policy that made the pair."""

    def encoded_image(self) -> dict[str, Any]:
        """Return the image as Hugging Face stores one, its bytes only where they are embedded."""
        content = image_bytes(self.pair.prompt.image) if self.embedded else None
        return {"bytes": content, "path": Path(self.image).name if self.embedded else self.image}


def image_bytes(path: str) -> bytes:
    """Read an image file of a run.

    Raises:
        CsrError: It is no longer there.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CsrError(f"the image {path} cannot be read: {error.strerror}", "put it back where it was") from None


def last_said(chosen: Any, rejected: Any) -> Responses:
    """Return what the assistant says last in each of two conversations; empty where it says nothing."""
    return (said(chosen, *ASSISTANT) or [""])[-1], (said(rejected, *ASSISTANT) or [""])[-1]


def user_turns(row: Row) -> int:
    """Count the questions of a row's conversation; 1 where the question is a plain text."""
    talks = [row.get(name) for name in ("prompt", "conversations", "messages")]
    return max([len(said(talk, "human", "user")) for talk in talks if isinstance(talk, list)], default=1)


def registered(path: Path, empty: Any) -> Any:
    """Read a list of data sets that another export may have begun.

    Raises:
        CsrError: There is a file of another form.
    """
    if not path.exists():
        return empty
    try:
        found = read_json(path)
    except CsrError:
        found = None
    if not isinstance(found, type(empty)):
        raise CsrError(f"{path} is no list of data sets of this format", "give another --out")
    return found
