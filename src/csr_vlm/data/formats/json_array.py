"""A JSON file that is one array of objects, read and written an object at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from csr_vlm.data.formats.rows import LONGEST_LINE, BadRow, Rows, open_file
from csr_vlm.store.files import write_atomically

_CHUNK = 1 << 16
_SPACE = " \t\r\n"


def rows(path: Path) -> Rows:
    open_file(path).close()
    # What is not UTF-8 shows in the row that has it, and costs no other.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as handle:
        number = 0
        try:
            for number, item in enumerate(_items(handle), start=1):
                yield f"{path.name} entry {number}", item if isinstance(item, dict) else BadRow("not a JSON object")
        except (ValueError, RecursionError):
            yield f"{path.name} entry {number + 1}", BadRow("broken JSON")


def count(path: Path) -> int:
    """Count entries, which takes a pass over the file."""
    return sum(1 for _ in rows(path))


def write(path: Path, items: Iterable[dict[str, Any]]) -> None:
    """Write one array, as its objects come."""

    def fill(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as handle:
            separator = "[\n"
            for item in items:
                handle.write(separator + json.dumps(item, ensure_ascii=False))
                separator = ",\n"
            handle.write("\n]\n" if separator != "[\n" else "[]\n")

    write_atomically(path, fill)


def _items(handle: IO[str]) -> Iterator[Any]:
    """Yield the elements of an array, holding one and a chunk of what follows.

    Raises:
        ValueError: It is not an array, or breaks off.
    """
    decoder = json.JSONDecoder()
    buffer, at, wanted = "", 0, "["
    while True:
        buffer, at = _skip_space(handle, buffer, at)
        sign = buffer[at : at + 1]
        if sign == "]" and wanted in ("first", ","):
            return
        if wanted in ("[", ","):
            if sign != wanted:
                raise ValueError(f"{wanted} expected")
            at, wanted = at + 1, "first" if wanted == "[" else "item"
            continue
        item, buffer, at = _decode(decoder, handle, buffer, at)
        yield item
        wanted = ","


def _skip_space(handle: IO[str], buffer: str, at: int) -> tuple[str, int]:
    """Drop what was read and the white space that follows."""
    while True:
        rest = buffer[at:].lstrip(_SPACE)
        if rest:
            return rest, 0
        buffer, at = handle.read(_CHUNK), 0
        if not buffer:
            return "", 0


def _decode(decoder: json.JSONDecoder, handle: IO[str], buffer: str, at: int) -> tuple[Any, str, int]:
    """Decode one value, reading on until it is whole."""
    while True:
        try:
            value, end = decoder.raw_decode(buffer, at)
        except ValueError:
            if len(buffer) > LONGEST_LINE:
                raise
            end = None
        # A number may go on where the chunk does not: 1 of 1.5.
        if end is not None and buffer[end : end + 1] in (",", "]", *_SPACE):
            return value, buffer, end
        more = handle.read(max(_CHUNK, len(buffer)))
        if not more and end is not None:
            return value, buffer, end
        if not more:
            raise ValueError("the array breaks off")
        buffer += more
