"""JSON Lines: one object a line, such as {"id": 1, "image": "a.jpg", "text": "What is this?"}."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from csr_vlm.data.formats.rows import LONGEST_LINE, BadRow, Row, Rows, open_file
from csr_vlm.store.files import write_atomically


def rows(path: Path) -> Rows:
    with open_file(path) as handle:
        for number, line in enumerate(_lines(handle), start=1):
            if line is None or line.strip():
                yield f"{path.name} line {number}", BadRow("endless line") if line is None else _parsed(line)


def count(path: Path) -> int:
    with open_file(path) as handle:
        return sum(1 for line in _lines(handle) if line is None or line.strip())


def write(path: Path, items: Iterable[dict[str, Any]]) -> None:
    """Write one object a line, as they come."""

    def fill(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as handle:
            handle.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)

    write_atomically(path, fill)


def _lines(handle: IO[bytes]) -> Iterator[bytes | None]:
    """Yield lines as they are; None in place of one that is too long to be held."""
    while line := handle.readline(LONGEST_LINE):
        if len(line) < LONGEST_LINE or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = handle.readline(LONGEST_LINE)
        yield None


def _parsed(line: bytes) -> Row | BadRow:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # JSON, UTF-8, endless numbers, endless nesting
        row = None
    return row if isinstance(row, dict) else BadRow("not a JSON object")
