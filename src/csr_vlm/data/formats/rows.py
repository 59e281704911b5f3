"""What every format comes down to: rows with an id, an image and a text, or the reason why not.

A reader yields ``(where, row)``: where it stands, for people, and a mapping with the fields
of its file, or a :class:`BadRow`. Field names differ from file to file; the first that is
there counts::

    id       prompt_id, id, question_id, idx, __key__ (given by readers of files without ids)
    image    image, images (one), file_name: a path, bytes, or {"bytes": ..., "path": ...}
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
IDS = ("prompt_id", "id", "question_id", "idx", "__key__")
IMAGES = ("image", "images", "file_name")
TEXTS = ("text", "question", "input", "prompt", "conversations", "messages")
RESPONSES = ("chosen", "rejected", "rejected_conversations", "rejected_response")
FIELDS = (*IDS, *IMAGES, *TEXTS, *RESPONSES)
"""All that is ever read of a row; readers of columns skip the others."""
PLACEHOLDER = "<image>"
LONGEST_TEXT = 50_000
"""Characters of a prompt: more is no question, and no model here reads it."""
LONGEST_ID = 500
"""Characters of an id, which every row of a ledger repeats."""
LONGEST_LINE = 1 << 24
"""Characters of a line or an entry; more is a file that lacks line breaks or brackets."""
_COCO_NAME = re.compile(r"^(?:COCO_[a-z]+\d{4}_)?(\d{9,12}\.(?:jpg|png))$")
_COCO_SPLITS = (
    "train2014", "val2014", "test2014", "test2015", "train2017", "val2017", "test2017", "unlabeled2017",
)  # fmt: skip


class BadRow(ValueError):
    """A row that names no usable prompt; the message says why in a few words."""


Found = tuple[str, Row | BadRow]
Rows = Iterator[Found]


@dataclass(frozen=True)
class Entry:
    """A row under names of our own."""

    row_id: str
    image: Path | bytes
    """Path of the file, resolved, or what an image file would hold."""
    text: str
    """Without image placeholders; empty where the row asks nothing."""


def entry_of(row: Row | BadRow, root: Path | None) -> Entry:
    """Find a row's id, image and text.

    Args:
        row: As a reader yields it.
        root: Folder that image paths are relative to and may not leave; None where there is none.

    Raises:
        BadRow: It has no id or no image, its path leaves the root, or something cannot be stored.
    """
    if isinstance(row, BadRow):
        raise row
    row_id, image, text = first(row, IDS), image_of(row), text_of(row)
    if not isinstance(row_id, str | int) or row_id == "" or image is None:
        raise BadRow("no prompt_id or no image")
    if len(text) > LONGEST_TEXT:
        raise BadRow(f"prompt of more than {LONGEST_TEXT:,} characters")
    try:
        f"{row_id}{text}".encode()
    except (UnicodeEncodeError, ValueError):  # Half a surrogate pair; a number of thousands of digits.
        raise BadRow("text or path that cannot be encoded or resolved") from None
    if len(str(row_id)) > LONGEST_ID:
        raise BadRow(f"id of more than {LONGEST_ID:,} characters")
    return Entry(str(row_id), image_path(root, image) if isinstance(image, str) else image, text)


def first(row: Row, names: Iterable[str]) -> Any:
    """Return the first of some fields that is there."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def image_of(row: Row) -> str | bytes | None:
    """Return the row's image as a path or as encoded bytes; None where it has none.

    Raises:
        BadRow: It has several.
    """
    value = first(row, IMAGES)
    if isinstance(value, list):
        if len(value) > 1:
            raise BadRow("several images")
        value = value[0] if value else None
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    return value if isinstance(value, str | bytes) and value else None


def text_of(row: Row) -> str:
    """Return what the row asks, without image placeholders; empty where it asks nothing."""
    value = first(row, TEXTS)
    if isinstance(value, list):
        value = next(iter(said(value, "human", "user")), None)
    return plain(value) if isinstance(value, str) else ""


def plain(text: str) -> str:
    """Take image placeholders and the white space around the rest out of a text."""
    return text.replace(PLACEHOLDER, "").strip()


def said(messages: Any, *roles: str) -> list[str]:
    """List what some roles say in a conversation, in LLaVA's form or in the chat templates'.

    ``[{"from": "human", "value": "Hi"}]`` and ``[{"role": "user", "content": "Hi"}]``, whose
    content may also be ``[{"type": "image"}, {"type": "text", "text": "Hi"}]``.
    """
    texts = []
    for message in messages if isinstance(messages, list) else [messages]:
        if not isinstance(message, Mapping) or first(message, ("from", "role")) not in roles:
            continue
        content = first(message, ("value", "content"))
        if isinstance(content, list):
            parts = [part.get("text") for part in content if isinstance(part, Mapping)]
            content = "".join(part for part in parts if isinstance(part, str))
        texts.append(content if isinstance(content, str) else "")
    return texts


def image_path(root: Path | None, name: str) -> Path:
    """Resolve a path below the root; COCO's images are found under any of their names.

    ``COCO_train2014_000000123456.jpg``, ``000000123456.jpg`` and
    ``train2017/000000123456.jpg`` are one picture, and folders hold it under either name.

    Raises:
        BadRow: There is no root, or the path cannot be resolved or leaves it.
    """
    if root is None:
        raise BadRow("image outside the data set")
    path = _inside(root, name)
    if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises on names that are too long
        for candidate in _coco_names(name):
            if os.path.isfile(root / candidate):  # noqa: PTH113
                return _inside(root, candidate)
    return path


def _inside(root: Path, name: str) -> Path:
    try:
        path = (root / name).resolve()
        str(path).encode()
    except (ValueError, RuntimeError, OSError):  # NUL, half a surrogate pair, loop of links
        raise BadRow("text or path that cannot be encoded or resolved") from None
    if not path.is_relative_to(root):
        raise BadRow("image outside the image root")
    return path


def _coco_names(name: str) -> Iterator[str]:
    """Yield the places where an image of COCO may be instead."""
    given = PurePosixPath(name)
    matched = _COCO_NAME.match(given.name)
    if matched is None:
        return
    number = matched[1]
    parents = [part for part in given.parent.parts if part != "/"]
    folders = ["/".join(parents[start:]) for start in range(len(parents) + 1)]
    for folder in (*folders, *_COCO_SPLITS):
        for file in (number, *(f"COCO_{split}_{number}" for split in _COCO_SPLITS[:4])):
            yield f"{folder}/{file}" if folder else file


def open_file(path: Path) -> IO[bytes]:
    """Open a file of prompts or pairs.

    Raises:
        CsrError: It cannot be opened, or is a pipe or a device.
    """
    try:
        return open_regular(path)
    except (OSError, ValueError) as error:  # the latter for names that no file can have
        reason = error.strerror if isinstance(error, OSError) else "no file can have that name"
        raise CsrError(f"the file {str(path)[:300]} cannot be opened: {reason}", "set data.prompts") from None
