"""Define what every format yields: rows with an id, an image and a text, or the reason why a row is unusable.

The ``rows`` function of a format yields ``(position, row)``: the row's position in its source, for
messages, and a mapping with the file's own fields, or a :class:`BadRow`. Field names differ
between files; the first of these that is present is used::

    id       prompt_id, id, question_id, idx, image_id, __key__ (the row's number, set by the formats)
    image    image, images (a list of one), file_name, image_path, or the image inside prompt or messages:
             a path, file:// address, data URI, Base64, bytes, or {"bytes": ..., "path": ...}
    text     text, question, instruction, input, prompt, query, conversations, messages, chosen (their first question)

Empty values and NaN count as absent.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from csr_vlm.core.errors import CsrError
from csr_vlm.data.images import suffix_of
from csr_vlm.data.placeholders import DATA_SET_PLACEHOLDERS, remove_placeholders
from csr_vlm.store.files import open_regular

Row = Mapping[str, Any]
"""Row of a source file, under the file's own field names."""
ID_FIELDS = ("prompt_id", "id", "question_id", "idx", "image_id", "__key__")
IMAGE_FIELDS = ("image", "images", "file_name", "image_path")
CONVERSATIONS = ("prompt", "conversations", "messages", "chosen")
TEXT_FIELDS = tuple(dict.fromkeys(("text", "question", "instruction", "input", "prompt", "query", *CONVERSATIONS)))
RESPONSE_FIELDS = (
    *("chosen", "rejected", "reject", "rejected_conversations", "rejected_response", "rejected_messages"),
    *("context", "y_win", "y_lose", "chosen_ends", "rejected_ends", "system", "history", "response", "rejected_images"),
)
MESSAGES = (*CONVERSATIONS, "rejected", "rejected_conversations", "rejected_response", "rejected_messages")
"""Fields that may hold messages, which tables sometimes store as JSON."""
FIELDS = tuple(dict.fromkeys((*ID_FIELDS, *IMAGE_FIELDS, *TEXT_FIELDS, *RESPONSE_FIELDS)))
"""All fields that are ever read; column formats skip the others."""
_JOINED = {"instruction": "input", "prompt": "query"}
IMAGE_PLACEHOLDER = DATA_SET_PLACEHOLDERS[0]
_URL = re.compile(r"^[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_FILE_URL = re.compile(r"^file:(?=/)", re.IGNORECASE)
_BASE64 = re.compile(r"^[A-Za-z0-9+/_\s-]{8,}={0,2}\s*$")
MAX_TEXT_CHARS = 50_000
"""Limit for a prompt or a response; no supported model reads more."""
MAX_ID_CHARS = 500
"""Limit for an id, which every row of a ledger repeats."""
MAX_LINE_CHARS = 1 << 24
"""Limit for a line or an array element; a longer one means that line breaks or brackets are missing."""
_URL_SAFE = str.maketrans("-_", "+/")
_UNENCODABLE = "text or path that cannot be encoded or resolved"
_COCO_NAME = re.compile(r"^(?:COCO_[a-z]+\d{4}_)?(\d{9,12}\.(?:jpg|png))$")
_COCO_SPLITS = (
    "train2014", "val2014", "test2014", "test2015", "train2017", "val2017", "test2017", "unlabeled2017",
)  # fmt: skip


class BadRow(ValueError):
    """Represent a row without a usable prompt; the message gives the reason in a few words.

    Reasons are counted, so they contain nothing that differs from row to row; ``detail`` may.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


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


def parse_row(row: Row | BadRow, root: Path | None, *, follow_links: bool = True) -> ParsedRow:
    """Extract a row's id, image and text.

    Args:
        row: Row as a format yields it.
        root: Folder that image paths are relative to and may not leave; None if there is none.
        follow_links: Whether symbolic links below the root may lead out of it.

    Raises:
        BadRow: The row is one, has no image, its path leaves the root, or a value cannot be stored.
    """
    if isinstance(row, BadRow):
        raise row
    row = unpacked(row)
    row_id, image, text = row_id_of(row), row_image(row), row_text(row)
    if image is None:
        raise _without_image(row)
    if len(text) > MAX_TEXT_CHARS:
        raise BadRow(f"prompt of more than {MAX_TEXT_CHARS:,} characters")
    try:
        f"{row_id}{text}".encode()
    except UnicodeEncodeError:  # Half a surrogate pair.
        raise BadRow(_UNENCODABLE) from None
    if len(row_id) > MAX_ID_CHARS:
        raise BadRow(f"id of more than {MAX_ID_CHARS:,} characters")
    if isinstance(image, str):
        resolved: Path | bytes = _image_source(root, image, follow_links=follow_links)
    else:
        resolved = image
    return ParsedRow(row_id, resolved, text)


def unpacked(row: Row) -> Row:
    """Return a row with its JSON texts read: messages, and a ``text`` that is an object, as RLHF-V's is.

    Raises:
        BadRow: The object has responses but no question, or is not complete.
    """
    messages = {name: _messages(row[name]) for name in MESSAGES if isinstance(row.get(name), str)}
    row = {**row, **messages} if messages else row
    text = row.get("text")
    if not isinstance(text, str) or not text.lstrip("\ufeff \t\r\n").startswith("{"):
        return row
    fields = _from_json(text)
    if fields is None and re.match(r'\W*"(question|chosen|rejected)"\s*:', text):
        raise BadRow("text is a JSON object that is not complete")
    if not isinstance(fields, dict) or not fields.keys() & {"question", *RESPONSE_FIELDS}:
        return row
    if not is_present(fields.get("question")):
        raise BadRow("text is a JSON object without a question", _missing(("question",), fields))
    return {name: value for name, value in row.items() if name != "text"} | {
        name: value for name, value in fields.items() if name in FIELDS
    }


def _messages(value: str) -> Any:
    """Return the messages that a text holds as JSON, else the text."""
    content = _from_json(value) if value.lstrip("\ufeff \t\r\n")[:1] in ("[", "{") else None
    messages = content if isinstance(content, list) else [content]
    is_message = [isinstance(item, dict) and bool(item.keys() & {"role", "from"}) for item in messages]
    return content if is_message and all(is_message) else value


def _from_json(text: str) -> Any:
    """Return what a text holds as JSON; None if it is not JSON."""
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        return None


def numbered(row: Row | BadRow, path: Path, number: int) -> Row | BadRow:
    """Give a row its number in its file as an id, for rows that have none of their own."""
    return row if isinstance(row, BadRow) else {"__key__": f"{path.stem}-{number}", **row}


def is_present(value: Any) -> bool:
    """Return whether a value is given: not None, NaN, or blank."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return False
    return not (isinstance(value, str) and not value.strip())


def first_field(row: Row, names: Iterable[str]) -> Any:
    """Return the first of the named fields that is present; None if none is."""
    return next((row[name] for name in names if is_present(row.get(name))), None)


def row_id_of(row: Row) -> str:
    """Return a row's id as text; whole numbers that a table stored as floats lose their .0.

    Raises:
        BadRow: The row has no id, or one that is neither text nor a number.
    """
    value = first_field(row, ID_FIELDS)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None:
        raise BadRow("no id", _missing(ID_FIELDS[:-1], row))
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow("id that is neither text nor a number")
    try:
        return str(value)
    except ValueError:  # An integer of thousands of digits.
        raise BadRow(_UNENCODABLE) from None


def row_image(row: Row) -> str | bytes | None:
    """Return the row's image as a path or as encoded bytes; None if it has none.

    Raises:
        BadRow: The row has several images, or one that is an address on the web.
    """
    for value in (*(row.get(name) for name in IMAGE_FIELDS), _message_images(row)):
        image = _single_image(value)
        if image is not None:
            return image
    return None


def _single_image(value: Any) -> str | bytes | None:
    if isinstance(value, str) and value.lstrip().startswith('["'):
        value = _from_json(value) or value
    if isinstance(value, list):
        if len(value) > 1 and not all(isinstance(item, int) for item in value):
            raise BadRow("several images")
        value = value[0] if value else None
    if isinstance(value, Mapping):
        value = next((value[name] for name in ("bytes", "path", "url", "image") if value.get(name)), None)
    if isinstance(value, str):
        return _from_text(value.strip()) if value.strip() else None
    return value if isinstance(value, bytes) and value else None


def _from_text(value: str) -> str | bytes:
    """Return the path or the content that a text stands for.

    Raises:
        BadRow: It is an address on the web, or a data URI that cannot be decoded.
    """
    if _FILE_URL.match(value):
        try:
            return unquote(urlsplit(value).path) or value
        except ValueError:
            raise BadRow(_UNENCODABLE) from None
    if _URL.match(value):
        raise BadRow("image is a URL, which is not fetched; download it")
    if value[:5].lower() == "data:":
        head, comma, body = value.partition(",")
        decoded = _from_base64(unquote(body)) if comma and head.lower().endswith(";base64") else None
        if decoded is None:
            raise BadRow("image is a data URI that cannot be decoded")
        return decoded
    if _BASE64.match(value) and suffix_of(content := _from_base64(value) or b""):
        return content
    return value


def _from_base64(text: str) -> bytes | None:
    """Decode Base64, also its URL-safe form, with line breaks or without padding; None if that is impossible."""
    text = "".join(text.split()).rstrip("=").translate(_URL_SAFE)
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None


def _message_images(row: Row) -> list[Any]:
    """List the images inside a row's conversation, as OpenAI's and TRL's messages hold them."""
    found = []
    for name in CONVERSATIONS:
        messages = row.get(name)
        for message in messages if isinstance(messages, list) else ():
            content = message.get("content") if isinstance(message, Mapping) else None
            for part in content if isinstance(content, list) else ():
                if not isinstance(part, Mapping):
                    continue
                names = ("image", "image_url", "url", "path", "base64")
                value = next((part[key] for key in names if is_present(part.get(key))), None)
                if value is not None:
                    found.append(value)
        if found:
            break
    return found


def row_text(row: Row) -> str:
    """Return the row's question without image placeholders; empty if it has none.

    Alpaca's ``instruction`` and ``input``, or ``prompt`` and ``query``, are joined by a line break. A system message is
    put before the question.
    """
    for name in TEXT_FIELDS:
        value = row.get(name)
        if name == "chosen" and not isinstance(value, list):  # a response, not a conversation
            continue
        if isinstance(value, str) and value.strip() and is_present(rest := row.get(_JOINED.get(name, ""))):
            value = f"{value}\n{rest}"
        if isinstance(value, list):
            value = next(iter(message_texts(value, "human", "user")), None)
        if isinstance(value, str) and (text := strip_placeholders(value)):
            return "\n\n".join([*_system_messages(row), text])
    return ""


def _system_messages(row: Row) -> list[str]:
    """List the system message of a row, if it has one."""
    given = row.get("system")
    texts = [given] if isinstance(given, str) else []
    for name in CONVERSATIONS:
        if isinstance(row.get(name), list):
            texts += message_texts(row[name], "system")
    return [text.strip() for text in texts if text.strip()][:1]


def strip_placeholders(text: str) -> str:
    """Remove the placeholders of data sets, and the white space around the rest, from a text."""
    return remove_placeholders(text, DATA_SET_PLACEHOLDERS)[0]


def empty_prompt(row: Row) -> BadRow:
    """Return the reason for a row without a question, with the keys that were expected."""
    present = [name for name in TEXT_FIELDS if name in row and name != "chosen"]
    return BadRow("empty prompt", f"no question in {', '.join(present)}" if present else _missing(TEXT_FIELDS, row))


def _without_image(row: Row) -> BadRow:
    given = [name for name in IMAGE_FIELDS if is_present(row.get(name)) and row[name] not in ([], {})]
    if given:
        return BadRow("image that is neither a path nor bytes", f"in {', '.join(given)}")
    return BadRow("no image", _missing(IMAGE_FIELDS, row))


def _missing(expected: Iterable[str], row: Row) -> str:
    """Say which keys were expected and which ones the row has."""
    present = [name for name in map(str, row) if name != "__key__" and name.isprintable()]
    return f"expected one of {', '.join(expected)}; the row has {', '.join(present[:12])[:200] or 'nothing'}"


def message_texts(messages: Any, *roles: str) -> list[str]:
    """List the texts of the given roles' messages in a conversation, in LLaVA's form or a chat template's.

    These are ``[{"from": "human", "value": "Hi"}]`` and ``[{"role": "user", "content": "Hi"}]``,
    whose content may also be ``[{"type": "image"}, {"type": "text", "text": "Hi"}]``.
    """
    texts = []
    for message in messages if isinstance(messages, list) else [messages]:
        if not isinstance(message, Mapping) or str(first_field(message, ("from", "role"))).lower() not in roles:
            continue
        content = first_field(message, ("value", "content"))
        if isinstance(content, list):
            parts = [part.get("text") for part in content if isinstance(part, Mapping)]
            content = "".join(part for part in parts if isinstance(part, str))
        texts.append(content if isinstance(content, str) else "")
    return texts


def _image_source(root: Path | None, name: str, *, follow_links: bool) -> Path:
    """Resolve an image path, also one with Windows separators, percent escapes or differently composed accents."""
    path = resolve_image_path(root, name, follow_links=follow_links)
    if os.path.exists(path):  # noqa: PTH110 - Path.exists raises on names that are too long
        return path
    slashed = name.replace("\\", "/")
    others = (slashed, unquote(name), *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD")))
    for other in dict.fromkeys(other for other in others if other != name and "\0" not in other):
        if os.path.exists(candidate := resolve_image_path(root, other, follow_links=follow_links)):  # noqa: PTH110
            return candidate
    return path if slashed == name else resolve_image_path(root, slashed, follow_links=follow_links)


def resolve_image_path(root: Path | None, name: str, *, follow_links: bool = True) -> Path:
    """Resolve a path below the root, also under the other names that COCO's images have.

    ``COCO_train2014_000000123456.jpg``, ``000000123456.jpg`` and ``train2017/000000123456.jpg``
    are the same picture, and folders use either name.

    Raises:
        BadRow: There is no root, or the path cannot be resolved or leaves the root.
    """
    if root is None:
        raise BadRow("image outside the data set")
    path = _resolve_below(root, name, follow_links=follow_links)
    if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises on names that are too long
        for candidate in _coco_names(name):
            if os.path.isfile(root / candidate):  # noqa: PTH113
                return _resolve_below(root, candidate, follow_links=follow_links)
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


def _resolve_below(root: Path, name: str, *, follow_links: bool) -> Path:
    try:
        path = (root / name).resolve()
        str(path).encode()
        if path.is_relative_to(root):
            return path
        linked = ".." not in Path(name).parts and any(
            parent.resolve() == root for parent in (root / name).parents if parent != parent.parent
        )
    except (ValueError, RuntimeError, OSError):  # NUL, half a surrogate pair, a loop of links
        raise BadRow(_UNENCODABLE) from None
    if not linked:
        raise BadRow("image outside the image root", "set data.image_root to a folder that holds the images")
    if not follow_links:
        raise BadRow("link out of the image root, with data.follow_links=false")
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
