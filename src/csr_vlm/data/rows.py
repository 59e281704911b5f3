"""Define what every format yields: rows with an id, an image and a text, or the reason why a row is unusable.

The ``rows`` function of a format yields ``(position, row)``: the row's position in its source, for
messages, and a mapping with the file's own fields, or a :class:`BadRow`. Field names differ
between files; the first of these that is present is used::

    id       prompt_id, id, question_id, idx, __key__ (set by formats whose rows may lack an id)
    image    image, images (a list of one), file_name: a path, bytes, or {"bytes": ..., "path": ...}
    text     text, question, input, prompt, conversations or messages (their first question)
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from csr_vlm.core.errors import CsrError
from csr_vlm.store.files import open_regular

Row = Mapping[str, Any]
"""Row of a source file, under the file's own field names."""
ID_FIELDS = ("prompt_id", "id", "question_id", "idx", "__key__")
IMAGE_FIELDS = ("image", "images", "file_name")
TEXT_FIELDS = ("text", "question", "input", "prompt", "conversations", "messages")
RESPONSE_FIELDS = ("chosen", "rejected", "rejected_conversations", "rejected_response")
FIELDS = (*ID_FIELDS, *IMAGE_FIELDS, *TEXT_FIELDS, *RESPONSE_FIELDS)
"""All fields that are ever read; column formats skip the others."""
IMAGE_PLACEHOLDER = "<image>"
MAX_TEXT_CHARS = 50_000
"""Limit for a prompt or a response; no supported model reads more."""
MAX_ID_CHARS = 500
"""Limit for an id, which every row of a ledger repeats."""
MAX_LINE_CHARS = 1 << 24
"""Limit for a line or an array element; a longer one means that line breaks or brackets are missing."""
_UNENCODABLE = "text or path that cannot be encoded or resolved"
_COCO_NAME = re.compile(r"^(?:COCO_[a-z]+\d{4}_)?(\d{9,12}\.(?:jpg|png))$")
_COCO_SPLITS = (
    "train2014", "val2014", "test2014", "test2015", "train2017", "val2017", "test2017", "unlabeled2017",
)  # fmt: skip


class BadRow(ValueError):
    """Represent a row without a usable prompt; the message gives the reason in a few words.

    Reasons are counted, so they contain nothing that differs from row to row.
    """


LocatedRow = tuple[str, Row | BadRow]
"""(position in the source for messages, row or the reason why there is none)."""
Rows = Iterator[LocatedRow]


@dataclass(frozen=True)
class ParsedRow:
    """Hold a row's id, image and text before the image is opened."""

    row_id: str
    image: Path | bytes
    """Resolved path of the image file, or the content of one."""
    text: str
    """Question without image placeholders; empty if the row has none."""


def parse_row(row: Row | BadRow, root: Path | None) -> ParsedRow:
    """Extract a row's id, image and text.

    Args:
        row: Row as a format yields it.
        root: Folder that image paths are relative to and may not leave; None if there is none.

    Raises:
        BadRow: The row is one, has no id or no image, its path leaves the root, or a value cannot be stored.
    """
    if isinstance(row, BadRow):
        raise row
    row_id, image, text = first_field(row, ID_FIELDS), row_image(row), row_text(row)
    if not isinstance(row_id, str | int) or row_id == "" or image is None:
        raise BadRow("no prompt_id or no image")
    if len(text) > MAX_TEXT_CHARS:
        raise BadRow(f"prompt of more than {MAX_TEXT_CHARS:,} characters")
    try:
        f"{row_id}{text}".encode()
    except (UnicodeEncodeError, ValueError):  # Half a surrogate pair; an integer of thousands of digits.
        raise BadRow(_UNENCODABLE) from None
    if len(str(row_id)) > MAX_ID_CHARS:
        raise BadRow(f"id of more than {MAX_ID_CHARS:,} characters")
    return ParsedRow(str(row_id), resolve_image_path(root, image) if isinstance(image, str) else image, text)


def first_field(row: Row, names: Iterable[str]) -> Any:
    """Return the first of the named fields that is present and not None."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def row_image(row: Row) -> str | bytes | None:
    """Return the row's image as a path or as encoded bytes; None if it has none.

    Raises:
        BadRow: The row has several images.
    """
    value = first_field(row, IMAGE_FIELDS)
    if isinstance(value, list):
        if len(value) > 1:
            raise BadRow("several images")
        value = value[0] if value else None
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    return value if isinstance(value, str | bytes) and value else None


def row_text(row: Row) -> str:
    """Return the row's question without image placeholders; empty if it has none."""
    value = first_field(row, TEXT_FIELDS)
    if isinstance(value, list):
        value = next(iter(message_texts(value, "human", "user")), None)
    return strip_placeholders(value) if isinstance(value, str) else ""


def strip_placeholders(text: str) -> str:
    """Remove image placeholders, and the white space around the rest, from a text."""
    return text.replace(IMAGE_PLACEHOLDER, "").strip()


def message_texts(messages: Any, *roles: str) -> list[str]:
    """List the texts of the given roles' messages in a conversation, in LLaVA's form or a chat template's.

    These are ``[{"from": "human", "value": "Hi"}]`` and ``[{"role": "user", "content": "Hi"}]``,
    whose content may also be ``[{"type": "image"}, {"type": "text", "text": "Hi"}]``.
    """
    texts = []
    for message in messages if isinstance(messages, list) else [messages]:
        if not isinstance(message, Mapping) or first_field(message, ("from", "role")) not in roles:
            continue
        content = first_field(message, ("value", "content"))
        if isinstance(content, list):
            parts = [part.get("text") for part in content if isinstance(part, Mapping)]
            content = "".join(part for part in parts if isinstance(part, str))
        texts.append(content if isinstance(content, str) else "")
    return texts


def resolve_image_path(root: Path | None, name: str) -> Path:
    """Resolve a path below the root, also under the other names that COCO's images have.

    ``COCO_train2014_000000123456.jpg``, ``000000123456.jpg`` and ``train2017/000000123456.jpg``
    are the same picture, and folders use either name.

    Raises:
        BadRow: There is no root, or the path cannot be resolved or leaves the root.
    """
    if root is None:
        raise BadRow("image outside the data set")
    path = _resolve_below(root, name)
    if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises on names that are too long
        for candidate in _coco_names(name):
            if os.path.isfile(root / candidate):  # noqa: PTH113
                return _resolve_below(root, candidate)
    return path


def open_source_file(path: Path) -> IO[bytes]:
    """Open a file of prompts or pairs.

    Raises:
        CsrError: The file cannot be opened, or is a pipe or a device.
    """
    try:
        return open_regular(path)
    except (OSError, ValueError) as error:  # ValueError for a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else "not a valid file name"
        raise CsrError(f"the file {str(path)[:300]} cannot be opened: {reason}", "set data.prompts") from None


def _resolve_below(root: Path, name: str) -> Path:
    try:
        path = (root / name).resolve()
        str(path).encode()
    except (ValueError, RuntimeError, OSError):  # NUL, half a surrogate pair, a loop of links
        raise BadRow(_UNENCODABLE) from None
    if not path.is_relative_to(root):
        raise BadRow("image outside the image root")
    return path


def _coco_names(name: str) -> Iterator[str]:
    """Yield the other paths under which a COCO image may be stored."""
    path = PurePosixPath(name)
    match = _COCO_NAME.match(path.name)
    if match is None:
        return
    file_name = match[1]
    parents = [part for part in path.parent.parts if part != "/"]
    folders = ["/".join(parents[start:]) for start in range(len(parents) + 1)]
    for folder in (*folders, *_COCO_SPLITS):
        for file in (file_name, *(f"COCO_{split}_{file_name}" for split in _COCO_SPLITS[:4])):
            yield f"{folder}/{file}" if folder else file
