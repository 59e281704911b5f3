"""Share what the pair formats have in common: the exported record, its image, and conversations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Pair
from csr_vlm.data.rows import Row, message_texts
from csr_vlm.store.files import read_json

ASSISTANT_ROLES = ("gpt", "assistant")
Responses = tuple[str, str]
"""(chosen, rejected)."""


@dataclass(frozen=True)
class ExportedPair:
    """Hold one pair and the way a file refers to its image."""

    pair: Pair
    image: str
    """Path to write, absolute or relative to the file's folder."""
    embedded: bool
    """True if the image goes into the file itself, in formats that allow it."""
    origin: str
    """Model path of the policy that generated the pair."""

    def encoded_image(self) -> dict[str, Any]:
        """Return the image as Hugging Face stores it: bytes if embedded, else None, and a path."""
        content = image_bytes(self.pair.prompt.image) if self.embedded else None
        return {"bytes": content, "path": Path(self.image).name if self.embedded else self.image}


def image_bytes(path: str) -> bytes:
    """Read an image file of a run.

    Raises:
        CsrError: The file cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CsrError(f"the image {path} cannot be read: {error.strerror}", "restore the file") from None


def last_responses(chosen: Any, rejected: Any) -> Responses:
    """Return the assistant's last message of each of two conversations; empty if there is none."""
    texts = (message_texts(conversation, *ASSISTANT_ROLES) for conversation in (chosen, rejected))
    first, second = ((messages or [""])[-1] for messages in texts)
    return first, second


def num_user_turns(row: Row) -> int:
    """Count the questions of a row's conversation; 1 if the question is plain text."""
    conversations = [row.get(name) for name in ("prompt", "conversations", "messages", "chosen")]
    if isinstance(row.get("history"), list) and row["history"]:
        return 1 + len(row["history"])
    return max(
        [len(message_texts(value, "human", "user")) for value in conversations if isinstance(value, list)], default=1
    )


def read_registry(path: Path, empty: Any) -> Any:
    """Read a dataset_info.json that an earlier export may have written; ``empty`` if there is none.

    Raises:
        CsrError: The file has another form.
    """
    if not path.exists():
        return empty
    try:
        registry = read_json(path)
    except CsrError:
        registry = None
    if not isinstance(registry, type(empty)):
        raise CsrError(f"{path} is not a valid list of datasets for this format", "choose another --out")
    return registry
