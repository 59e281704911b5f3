"""Read and write Parquet; an image column holds paths, bytes, or Hugging Face's {"bytes": ..., "path": ...}."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from csr_vlm.core.batching import batched
from csr_vlm.data.rows import FIELDS, BadRow, Rows, open_source_file
from csr_vlm.store.tables import write_row_groups

_READ_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError, TypeError, KeyError, MemoryError)
"""Exceptions that damaged files cause: invalid UTF-8, dates out of range, sizes beyond memory."""
_BATCH_SIZE = 32
"""Rows held at once: about 10 MB with their images."""
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""Arrow type in which Hugging Face stores an image."""


def rows(path: Path) -> Rows:
    """Yield the rows of a file, or of all files in a folder in the order of their names."""
    for file in parquet_files(path):
        number = 0
        try:
            for number, row in enumerate(_file_rows(file), start=1):
                keyed = row if isinstance(row, BadRow) else {"__key__": f"{file.stem}-{number}", **row}
                yield f"{file.name} row {number}", keyed
        except _READ_ERRORS:
            yield f"{file.name} row {number + 1}", BadRow("damaged Parquet file")


def count(path: Path) -> int:
    """Count rows from the files' metadata; skip files that cannot be read, which :func:`rows` reports."""
    total = 0
    for file in parquet_files(path):
        try:
            total += pq.read_metadata(file).num_rows
        except _READ_ERRORS:
            continue
    return total


def parquet_files(path: Path) -> list[Path]:
    """Return the file itself, or all Parquet files below a folder, sorted."""
    return sorted(file for file in path.rglob("*.parquet") if file.is_file()) if path.is_dir() else [path]


def write(path: Path, records: Iterable[dict[str, Any]], columns: Mapping[str, pa.DataType]) -> None:
    """Write records as they come, with the metadata from which ``datasets.load_dataset`` decodes the images."""
    features = {name: _feature(kind) for name, kind in columns.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    write_row_groups(path, batched(records, _BATCH_SIZE), pa.schema(list(columns.items()), metadata=metadata))


def _file_rows(path: Path) -> Iterator[dict[str, Any] | BadRow]:
    open_source_file(path).close()
    with pq.ParquetFile(path, pre_buffer=False) as file:
        columns = [name for name in file.schema_arrow.names if name in FIELDS]
        for batch in file.iter_batches(_BATCH_SIZE, columns=columns):
            try:
                yield from batch.to_pylist()
            except _READ_ERRORS:
                yield from (_single_row(batch.slice(index, 1)) for index in range(batch.num_rows))


def _single_row(batch: pa.RecordBatch) -> dict[str, Any] | BadRow:
    """Convert one row of a batch that cannot be converted as a whole."""
    try:
        row: dict[str, Any] = batch.to_pylist()[0]
    except _READ_ERRORS:
        return BadRow("damaged row")
    return row


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """Return the Hugging Face feature of an Arrow type."""
    if kind == IMAGE:
        return {"_type": "Image"}
    if pa.types.is_list(kind):
        return {"_type": "List", "feature": _feature(kind.value_type)}
    if pa.types.is_struct(kind):
        return {kind.field(index).name: _feature(kind.field(index).type) for index in range(kind.num_fields)}
    return {"_type": "Value", "dtype": str(kind)}
