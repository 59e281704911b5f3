"""Read and write JSON Lines: one object per line, such as {"id": 1, "image": "a.jpg", "text": "What is this?"}."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from csr_vlm.data.rows import MAX_LINE_CHARS, BadRow, Row, Rows, numbered, open_source_file
from csr_vlm.store.files import write_atomically


def rows(path: Path) -> Rows:
    """Yield one row per line that is not blank."""
    with open_source_file(path) as handle:
        for number, line in enumerate(_lines(handle), start=1):
            if line is None or line.strip():
                row = BadRow("endless line") if line is None else _parse(line)
                yield f"{path.name} line {number}", numbered(row, path, number)


def count(path: Path) -> int:
    """Count the lines that are not blank."""
    with open_source_file(path) as handle:
        return sum(1 for line in _lines(handle) if line is None or line.strip())


def write(path: Path, objects: Iterable[dict[str, Any]]) -> None:
    """Write one object per line without holding them in memory."""

    def fill(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as handle:
            handle.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in objects)

    write_atomically(path, fill)


def _lines(handle: IO[bytes]) -> Iterator[bytes | None]:
    """Yield lines; None for a line that is too long to hold."""
    while line := handle.readline(MAX_LINE_CHARS):
        if len(line) < MAX_LINE_CHARS or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = handle.readline(MAX_LINE_CHARS)
        yield None


def _parse(line: bytes) -> Row | BadRow:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # Invalid JSON or UTF-8, huge numbers, deep nesting.
        row = None
    return row if isinstance(row, dict) else BadRow("not a JSON object")
