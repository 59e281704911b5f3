"""Read and write a JSON file that is one array of objects, one object at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from csr_vlm.data.rows import MAX_LINE_CHARS, BadRow, Row, Rows, numbered, open_source_file
from csr_vlm.store.files import write_atomically

_CHUNK = 1 << 16
"""Characters read at once."""
_MAX_OBJECT_BYTES = 1 << 28
"""Limit for a file that is one object, which is read as a whole."""
_WHITESPACE = " \t\r\n"


def rows(path: Path) -> Rows:
    """Yield the objects of the array; a syntax error ends the file with a BadRow."""
    open_source_file(path).close()
    # Decode invalid UTF-8 to surrogates, so that only the row that contains it is dropped.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as handle:
        number = 0
        if handle.read(_CHUNK).lstrip(_WHITESPACE)[:1] == "{":
            yield from _object_rows(path)
            return
        handle.seek(0)
        try:
            for number, value in enumerate(_elements(handle), start=1):
                row: Row | BadRow = value if isinstance(value, dict) else BadRow("not a JSON object")
                yield f"{path.name} entry {number}", numbered(row, path, number)
        except (ValueError, RecursionError):
            yield f"{path.name} entry {number + 1}", BadRow("broken JSON")


def count(path: Path) -> int:
    """Count the elements, which takes one pass over the file."""
    return sum(1 for _ in rows(path))


def write(path: Path, objects: Iterable[dict[str, Any]]) -> None:
    """Write one array without holding it in memory."""

    def fill(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as handle:
            separator = "[\n"
            for value in objects:
                handle.write(separator + json.dumps(value, ensure_ascii=False))
                separator = ",\n"
            handle.write("\n]\n" if separator != "[\n" else "[]\n")

    write_atomically(path, fill)


def _object_rows(path: Path) -> Rows:
    """Yield the values of a file that is one object, such as HA-DPO's descriptions by image id."""
    content = None
    if path.stat().st_size <= _MAX_OBJECT_BYTES:
        try:
            content = json.loads(path.read_bytes().decode("utf-8-sig", errors="surrogateescape"))
        except (ValueError, RecursionError):
            yield f"{path.name} entry 1", BadRow("broken JSON")
            return
    if not isinstance(content, dict) or not content or not all(isinstance(item, dict) for item in content.values()):
        yield f"{path.name} entry 1", BadRow("not an array of objects")
        return
    for number, (key, value) in enumerate(content.items(), start=1):
        yield f"{path.name} entry {number}", {"__key__": key, "image_id": key, **value}


def _elements(handle: IO[str]) -> Iterator[Any]:
    """Yield the elements of an array while holding one element and one chunk.

    Raises:
        ValueError: The text is not an array, or is truncated.
    """
    decoder = json.JSONDecoder()
    buffer, offset, expected = "", 0, "["
    while True:
        buffer, offset = _skip_whitespace(handle, buffer, offset)
        character = buffer[offset : offset + 1]
        if character == "]" and expected in ("first element", ","):
            return
        if expected in ("[", ","):
            if character != expected:
                raise ValueError(f"expected {expected}")
            offset, expected = offset + 1, "first element" if expected == "[" else "element"
            continue
        value, buffer, offset = _decode(decoder, handle, buffer, offset)
        yield value
        expected = ","


def _skip_whitespace(handle: IO[str], buffer: str, offset: int) -> tuple[str, int]:
    """Drop the text before ``offset`` and the white space after it."""
    while True:
        rest = buffer[offset:].lstrip(_WHITESPACE)
        if rest:
            return rest, 0
        buffer, offset = handle.read(_CHUNK), 0
        if not buffer:
            return "", 0


def _decode(decoder: json.JSONDecoder, handle: IO[str], buffer: str, offset: int) -> tuple[Any, str, int]:
    """Decode one value, reading more text until the value is complete."""
    while True:
        try:
            value, end = decoder.raw_decode(buffer, offset)
        except ValueError:
            if len(buffer) > MAX_LINE_CHARS:
                raise
            end = None
        # A number may continue in the next chunk: the 1 of 1.5.
        if end is not None and buffer[end : end + 1] in (",", "]", *_WHITESPACE):
            return value, buffer, end
        more = handle.read(max(_CHUNK, len(buffer)))
        if not more and end is not None:
            return value, buffer, end
        if not more:
            raise ValueError("truncated array")
        buffer += more
