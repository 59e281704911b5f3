"""Read Hugging Face's ImageFolder: images beside a metadata.jsonl, .csv or .parquet that lists them.

A line is ``{"file_name": "a.jpg", "question": "What is this?"}``. Image paths are relative to the
metadata file, and every subfolder may have one.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from csr_vlm.data.formats import jsonl, parquet
from csr_vlm.data.formats.folder import walk
from csr_vlm.data.rows import BadRow, Row, Rows, open_source_file, row_image

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def rows(path: Path) -> Rows:
    """Yield the rows of all metadata files below a folder."""
    for file in metadata_files(path):
        for position, row in _READERS[file.suffix](file):
            yield position, _resolve_image(row, file.parent.relative_to(path))


def count(path: Path) -> int:
    """Count the rows of all metadata files below a folder."""
    return sum(_COUNTERS[file.suffix](file) for file in metadata_files(path))


def metadata_files(path: Path) -> Iterator[Path]:
    """Yield the metadata files below a folder."""
    return (file for file in walk(path) if file.name in METADATA_NAMES)


def _resolve_image(row: Row | BadRow, folder: Path) -> Row | BadRow:
    """Make a row's image path relative to the root folder, and use the path as the row's id."""
    if isinstance(row, BadRow):
        return row
    try:
        name = row_image(row)
    except BadRow as error:
        return error
    if not isinstance(name, str):
        return BadRow("no image")
    image = (folder / name).as_posix()
    return {**row, "image": image, "__key__": image}


def _csv_rows(path: Path) -> Rows:
    open_source_file(path).close()
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
        table = csv.DictReader(handle)
        while True:
            try:
                row = next(table, None)
            except csv.Error:  # A field that is too long, or a stray quote; reading continues after it.
                yield f"{path.name} line {table.line_num}", BadRow("broken CSV")
                continue
            if row is None:
                return
            yield f"{path.name} line {table.line_num}", row


def _csv_count(path: Path) -> int:
    return sum(1 for _ in _csv_rows(path))


_READERS = {".jsonl": jsonl.rows, ".csv": _csv_rows, ".parquet": parquet.rows}
_COUNTERS = {".jsonl": jsonl.count, ".csv": _csv_count, ".parquet": parquet.count}
