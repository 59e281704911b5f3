"""Parquet, whose image column holds paths, bytes, or Hugging Face's {"bytes": ..., "path": ...}."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from csr_vlm.core.batching import batched
from csr_vlm.data.formats.rows import FIELDS, BadRow, Rows, open_file
from csr_vlm.store.tables import write_row_groups

_DAMAGE = (pa.ArrowException, OSError, ValueError, OverflowError, TypeError, KeyError, MemoryError)
"""What reading damaged files raises: text that is no UTF-8, dates beyond the calendar, sizes beyond memory."""
_BATCH = 32
"""Rows held at once: with their images, some 10 MB."""
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""How Hugging Face stores an image."""


def rows(path: Path) -> Rows:
    """Yield the rows of a file, or of all files in a folder by their names."""
    for file in parquet_files(path):
        number = 0
        try:
            for number, row in enumerate(_file_rows(file), start=1):
                own = row if isinstance(row, BadRow) else {"__key__": f"{file.stem}-{number}", **row}
                yield f"{file.name} row {number}", own
        except _DAMAGE:
            yield f"{file.name} row {number + 1}", BadRow("damaged Parquet file")


def count(path: Path) -> int:
    total = 0
    for file in parquet_files(path):
        try:
            total += pq.read_metadata(file).num_rows
        except _DAMAGE:  # Reading says so.
            continue
    return total


def parquet_files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*.parquet") if file.is_file()) if path.is_dir() else [path]


def write(path: Path, items: Iterable[dict[str, Any]], columns: Mapping[str, pa.DataType]) -> None:
    """Write rows as they come, so that ``datasets.load_dataset`` decodes the images."""
    features = {name: _feature(kind) for name, kind in columns.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    write_row_groups(path, batched(items, _BATCH), pa.schema(list(columns.items()), metadata=metadata))


def _file_rows(path: Path) -> Iterator[dict[str, Any] | BadRow]:
    open_file(path).close()
    with pq.ParquetFile(path, pre_buffer=False) as file:
        columns = [name for name in file.schema_arrow.names if name in FIELDS]
        for batch in file.iter_batches(_BATCH, columns=columns):
            try:
                yield from batch.to_pylist()
            except _DAMAGE:
                yield from (_row(batch.slice(place, 1)) for place in range(batch.num_rows))


def _row(batch: pa.RecordBatch) -> dict[str, Any] | BadRow:
    """Read one row of a batch that does not read as a whole."""
    try:
        row: dict[str, Any] = batch.to_pylist()[0]
    except _DAMAGE:
        return BadRow("damaged row")
    return row


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """Name an Arrow type as Hugging Face's features do."""
    if kind == IMAGE:
        return {"_type": "Image"}
    if pa.types.is_list(kind):
        return {"_type": "List", "feature": _feature(kind.value_type)}
    if pa.types.is_struct(kind):
        return {kind.field(index).name: _feature(kind.field(index).type) for index in range(kind.num_fields)}
    return {"_type": "Value", "dtype": str(kind)}
