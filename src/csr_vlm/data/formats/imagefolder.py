"""Hugging Face's ImageFolder: images beside a metadata.jsonl, .csv or .parquet that names them.

A line is {"file_name": "a.jpg", "question": "What is this?"}; the image is relative to the
metadata file, and there may be one in every subfolder. The files are read where they are.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from csr_vlm.data.formats import jsonl, parquet
from csr_vlm.data.formats.folder import files
from csr_vlm.data.formats.rows import BadRow, Row, Rows, image_of, open_file

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def rows(path: Path) -> Rows:
    for file in metadata_files(path):
        for where, row in _READERS[file.suffix](file):
            yield where, _placed(row, file.parent.relative_to(path))


def count(path: Path) -> int:
    return sum(_COUNTERS[file.suffix](file) for file in metadata_files(path))


def metadata_files(path: Path) -> Iterator[Path]:
    return (file for file in files(path) if file.name in NAMES)


def _placed(row: Row | BadRow, below: Path) -> Row | BadRow:
    """Name a row's image relative to the whole folder, and the row by it."""
    if isinstance(row, BadRow):
        return row
    try:
        name = image_of(row)
    except BadRow as error:
        return error
    if not isinstance(name, str):
        return BadRow("no prompt_id or no image")
    image = (below / name).as_posix()
    return {**row, "image": image, "__key__": image}


def _csv_rows(path: Path) -> Rows:
    open_file(path).close()
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
        table = csv.DictReader(handle)
        while True:
            try:
                row = next(table, None)
            except csv.Error:  # Too long a field, or a stray quote: the reader goes on behind it.
                yield f"{path.name} line {table.line_num}", BadRow("broken CSV")
                continue
            if row is None:
                return
            yield f"{path.name} line {table.line_num}", row


def _csv_count(path: Path) -> int:
    return sum(1 for _ in _csv_rows(path))


_READERS = {".jsonl": jsonl.rows, ".csv": _csv_rows, ".parquet": parquet.rows}
_COUNTERS = {".jsonl": jsonl.count, ".csv": _csv_count, ".parquet": parquet.count}
