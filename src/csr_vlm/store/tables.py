"""Read and write prompts, nodes and pairs as Parquet."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from csr_vlm.core.batching import batched
from csr_vlm.core.errors import CsrError, reason_of
from csr_vlm.core.records import SCHEMA_VERSION, Finish, Node, NodeStatus, Pair, Prompt, Response
from csr_vlm.store.files import open_regular, write_atomically

_STATUS = "fate"
"""Column of a node's status; version 0.1 chose the name, and its ledgers remain readable."""
_METADATA = {b"csr_vlm_schema": str(SCHEMA_VERSION).encode()}

_PROMPT = [("prompt_id", pa.string()), ("image", pa.string()), ("text", pa.string()), ("image_sha256", pa.string())]
PROMPTS = pa.schema(_PROMPT, metadata=_METADATA)
NODES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("iteration", pa.int32()),
        ("node_id", pa.string()),
        ("parent_id", pa.string()),
        ("depth", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("token_logprobs", pa.list_(pa.float32())),
        ("text", pa.string()),
        ("finish", pa.string()),
        (_STATUS, pa.string()),
        ("cosines", pa.map_(pa.string(), pa.float32())),
        ("claims", pa.map_(pa.string(), pa.map_(pa.string(), pa.float32()))),
    ],
    metadata=_METADATA,
)
_RESPONSE = pa.struct(
    [
        ("node_id", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("logprob", pa.float64()),
        ("text", pa.string()),
        ("num_sentences", pa.int32()),
        ("reward", pa.float64()),
        ("complete", pa.bool_()),
    ]
)
PAIRS = pa.schema(
    [
        *_PROMPT,
        ("iteration", pa.int32()),
        ("chosen", _RESPONSE),
        ("rejected", _RESPONSE),
        ("shared_tokens", pa.int32()),
        ("shared_logprob", pa.float64()),
    ],
    metadata=_METADATA,
)


_ROW_GROUP_SIZE = 1 << 14
"""Rows of a row group, which readers hold in memory at once."""
_PAIRS_GROUP_SIZE = 1 << 8
"""The same for pairs, which training reads in any order."""
_NEW = ("image_sha256", "claims", "shared_tokens", "shared_logprob")
"""Columns that version 0.1 did not write."""
_COMPRESSION = "zstd"
_BESIDE = "./"
"""Begins an image path that is relative to the folder of its table, because the image lies in the run."""


def write_row_groups(path: Path, groups: Iterable[Sequence[dict[str, Any]]], schema: pa.Schema) -> None:
    """Write each group of rows as one row group of a Parquet file, atomically, holding one group in memory.

    The bytes depend only on the rows and their groups.

    Raises:
        CsrError: The disk is full or fails.
    """

    def write(temporary: Path) -> None:
        with _writer(temporary, schema) as writer:
            for rows in groups:
                writer.write_table(pa.Table.from_pylist(list(rows), schema=schema), row_group_size=len(rows))

    write_atomically(path, write)


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(path, schema, compression=_COMPRESSION, write_page_checksum=True)


def _open(path: Path) -> pq.ParquetFile:
    """Open a regular file; a page whose checksum is wrong raises an error when it is read."""
    return pq.ParquetFile(_regular(path), page_checksum_verification=True)


def _has_schema(file: pq.ParquetFile, schema: pa.Schema) -> bool:
    """Return whether a file has the schema, or the one that version 0.1 wrote."""
    older = pa.schema([field for field in schema if field.name not in _NEW])
    return any(file.schema_arrow.equals(accepted) for accepted in (schema, older))


def _row_groups(path: Path, schema: pa.Schema) -> Iterator[list[dict[str, Any]]]:
    for table in _tables(path, schema):
        with _read_errors(path):
            rows = table.to_pylist(maps_as_pydicts="strict")
        yield rows


def _tables(path: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    with _read_errors(path), _open(path) as file:
        if not _has_schema(file, schema):
            raise pa.ArrowInvalid("it holds another type of table")
        for index in range(file.num_row_groups):
            yield file.read_row_group(index)


def read_whole(paths: Sequence[Path]) -> pa.Table:
    """Read files of one schema into one table in memory."""
    return pa.concat_tables([_read_whole(path) for path in paths])


def _read_whole(path: Path) -> pa.Table:
    with _read_errors(path):
        table = pq.read_table(_regular(path), page_checksum_verification=True)
    if "image" not in table.column_names:
        return table
    images = [absolute_image(image, path) for image in table["image"].to_pylist()]
    return table.set_column(table.column_names.index("image"), "image", pa.array(images, pa.string()))


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Turn errors of reading a damaged table into explanations.

    Raises:
        CsrError: Reading the table failed.
    """
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise CsrError(
            f"{path} cannot be read: {reason_of(error)}",
            "restore it; or delete it and the markers in done/ of the stages that read it, and run again",
        ) from None


def _regular(path: Path) -> Path:
    """Return the path unless it is a pipe, which would block, or a device, which may never end."""
    open_regular(path).close()
    return path


def stored_image(image: str, path: Path, root: Path | None) -> str:
    """Return the image path to store in a table: relative to the table's folder if the image lies below ``root``."""
    if root is None or not Path(image).is_relative_to(root):
        return image
    return _BESIDE + Path(os.path.relpath(image, path.parent.resolve())).as_posix()


def absolute_image(image: str, path: Path) -> str:
    """Return the absolute form of an image path that a table stores."""
    return os.path.normpath(path.parent.resolve() / image) if image.startswith(_BESIDE) else image


def _prompt_row(prompt: Prompt, path: Path, root: Path | None) -> dict[str, Any]:
    return asdict(prompt) | {"image": stored_image(prompt.image, path, root)}


def _prompt(row: dict[str, Any], path: Path) -> Prompt:
    image = absolute_image(row["image"], path)
    return Prompt(row["prompt_id"], image, row["text"], row.get("image_sha256") or "")


def write_prompts(path: Path, prompts: Iterable[Prompt], group_size: int, root: Path | None = None) -> None:
    """Write prompts in groups of ``group_size``; each row group is one work item.

    Images below ``root`` are stored with relative paths, so that the run can be moved.
    """
    root = None if root is None else root.resolve()
    rows = (_prompt_row(prompt, path, root) for prompt in prompts)
    write_row_groups(path, batched(rows, group_size), PROMPTS)


def prompt_groups(path: Path) -> Iterator[list[Prompt]]:
    """Yield the prompts of each work item."""
    return ([_prompt(row, path) for row in rows] for rows in _row_groups(path, PROMPTS))


class PromptGroups:
    """Read the prompts of work items in any order; the file stays open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _read_errors(path):
            self._file = _open(path)

    def __getitem__(self, item: int) -> list[Prompt]:
        with _read_errors(self._path):
            return [_prompt(row, self._path) for row in self._file.read_row_group(item).to_pylist()]


def write_nodes(path: Path, nodes: Iterable[Node]) -> None:
    """Write one ledger part; the nodes of each prompt must be adjacent."""
    rows = (
        vars(node)
        | {"finish": node.finish.value, _STATUS: node.status.value, "cosines": list(node.cosines.items())}
        | {"claims": [(claim, list(columns.items())) for claim, columns in node.claims.items()]}
        for node in nodes
    )
    write_row_groups(path, batched(rows, _ROW_GROUP_SIZE), NODES)


def join_nodes(path: Path, parts: Sequence[Path]) -> None:
    """Write the rows of several ledger parts as one file, row group by row group."""

    def write(temporary: Path) -> None:
        with _writer(temporary, NODES) as writer:
            for part in parts:
                for table in _tables(part, NODES):
                    writer.write_table(_with_claims(table))

    write_atomically(path, write)


def read_nodes(path: Path) -> Iterator[Node]:
    """Yield the nodes of one ledger part, holding one row group in memory."""
    for table in _tables(path, NODES):
        with _read_errors(path):
            nodes = _nodes(table)
        yield from nodes


def read_nodes_of(path: Path, prompt_ids: Iterable[str]) -> list[Node]:
    """Return the nodes of some prompts from one ledger part; other rows are not decoded."""
    with _read_errors(path):
        wanted = [("prompt_id", "in", list(prompt_ids))]
        table = pq.read_table(_regular(path), filters=wanted, page_checksum_verification=True)
        return _nodes(table)


def _nodes(table: pa.Table) -> list[Node]:
    """Convert a table to nodes column by column, three times as fast as Arrow converts lists and maps."""
    if any(column.null_count for column in table.columns):
        raise pa.ArrowInvalid("it has missing values")
    table = _with_claims(table)
    columns = {field.name: _values(chunk) for field in NODES for chunk in [table.column(field.name).combine_chunks()]}
    columns["finish"] = map(_FINISHES.__getitem__, columns["finish"])
    columns[_STATUS] = map(_STATUSES.__getitem__, columns[_STATUS])
    return list(map(Node, *columns.values()))


def _with_claims(table: pa.Table) -> pa.Table:
    """Return a table of nodes with the column ``claims``, which version 0.1 did not write."""
    if "claims" in table.column_names:
        return table
    none: list[list[Any]] = [[]] * len(table)
    return table.append_column(NODES.field("claims"), pa.array(none, NODES.field("claims").type))


_FINISHES = {finish.value: finish for finish in Finish}
_STATUSES = {status.value: status for status in NodeStatus}


def _values(array: pa.Array) -> Iterable[Any]:
    """Return the values of a column: tuples for lists, dictionaries for maps."""
    if pa.types.is_map(array.type):
        keys, items = array.keys.to_pylist(), list(_values(array.items))
        bounds = pairwise(array.offsets.to_numpy().tolist())
        return (dict(zip(keys[start:end], items[start:end], strict=True)) for start, end in bounds)
    if pa.types.is_list(array.type):
        values = array.values.to_numpy().tolist()
        return (tuple(values[start:end]) for start, end in pairwise(array.offsets.to_numpy().tolist()))
    if pa.types.is_floating(array.type):
        return array.to_numpy().tolist()  # type: ignore[no-any-return]
    scalars: list[Any] = array.to_pylist()
    return scalars


def read_trees(path: Path) -> Iterator[tuple[str, list[Node]]]:
    """Yield (prompt id, nodes) of each prompt of one ledger part."""
    for prompt_id, nodes in groupby(read_nodes(path), key=lambda node: node.prompt_id):
        yield prompt_id, list(nodes)


def write_pairs(path: Path, pairs: Iterable[Pair], root: Path | None = None) -> int:
    """Write pairs, holding one row group in memory, and return their number; see :func:`write_prompts` for ``root``."""
    root = None if root is None else root.resolve()
    rows = (
        _prompt_row(pair.prompt, path, root)
        | {"iteration": pair.iteration, "chosen": vars(pair.chosen), "rejected": vars(pair.rejected)}
        | {"shared_tokens": pair.shared_tokens, "shared_logprob": pair.shared_logprob}
        for pair in pairs
    )
    write_row_groups(path, batched(rows, _PAIRS_GROUP_SIZE), PAIRS)
    return count_rows(path)


def count_rows(path: Path) -> int:
    """Return the number of rows of a file."""
    with _read_errors(path):
        return int(pq.read_metadata(_regular(path)).num_rows)


def count_groups(path: Path) -> int:
    """Return the number of row groups of a file; for prompts, the number of work items."""
    with _read_errors(path):
        return int(pq.read_metadata(_regular(path)).num_row_groups)


def read_pairs(path: Path) -> Iterator[Pair]:
    """Yield the pairs of a file, holding one row group in memory."""
    for rows in _row_groups(path, PAIRS):
        yield from (_pair(row, path) for row in rows)


class PairFiles:
    """Read the pairs of files in any order, holding a few in memory.

    Pairs are numbered so that those about one image are consecutive: images in the order of their first
    pair, the pairs about an image in the order of the files.

    Raises:
        CsrError: A file cannot be read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._open: tuple[int, list[pq.ParquetFile]] | None = None
        sizes, images = [], []
        for path in self._paths:
            with _read_errors(path), _open(path) as file:
                if not _has_schema(file, PAIRS):
                    raise pa.ArrowInvalid("it holds another type of table")
                groups = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
                sizes += groups
                images += [file.read_row_group(index, columns=["image"])["image"] for index in range(len(groups))]
        self._group_starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        chunks = [chunk for column in images for chunk in column.chunks]
        codes = pa.chunked_array(chunks, pa.string()).dictionary_encode().combine_chunks().indices.to_numpy()
        self._rows = np.argsort(codes, kind="stable")
        self.group_sizes = np.bincount(codes)
        """Number of pairs about each image, in the order of the pairs."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, numbers: Sequence[int] | npt.NDArray[np.int64]) -> list[Pair]:
        """Return the pairs with these numbers, in their order."""
        rows = self._rows[np.asarray(numbers, dtype=np.int64)]
        groups = np.searchsorted(self._group_starts, rows, side="right") - 1
        pairs: dict[int, Pair] = {}
        for group in np.unique(groups).tolist():
            wanted = np.unique(rows[groups == group])
            path, table = self._row_group(group)
            found = table.take(wanted - self._group_starts[group]).to_pylist()
            pairs |= zip(wanted.tolist(), (_pair(row, path) for row in found), strict=True)
        return [pairs[row] for row in rows.tolist()]

    def _row_group(self, number: int) -> tuple[Path, pa.Table]:
        """Read a row group, by its number in all files, and name its file. A forked process opens the files itself."""
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), [_open(path) for path in self._paths])
        for path, file in zip(self._paths, self._open[1], strict=True):
            if number < file.num_row_groups:
                with _read_errors(path):
                    return path, file.read_row_group(number, use_threads=False)
            number -= file.num_row_groups
        raise IndexError(number)


def _pair(row: dict[str, Any], path: Path) -> Pair:
    return Pair(
        prompt=_prompt(row, path),
        iteration=row["iteration"],
        chosen=_response(row["chosen"]),
        rejected=_response(row["rejected"]),
        shared_tokens=row.get("shared_tokens") or 0,
        shared_logprob=row.get("shared_logprob") or 0.0,
    )


def _response(row: dict[str, Any]) -> Response:
    return Response(**row | {"token_ids": tuple(row["token_ids"])})
