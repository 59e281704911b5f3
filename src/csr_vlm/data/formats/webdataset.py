"""WebDataset: tar files whose neighbours of one name are one sample, a.jpg beside a.json or a.txt.

Members are read as a stream and nothing is ever extracted: their names are only names.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator
from itertools import groupby
from lzma import LZMAError
from pathlib import Path
from typing import Any, Self

from csr_vlm.data.formats.rows import BadRow, Row, Rows, open_file
from csr_vlm.data.images import SUFFIXES

_LARGEST = 1 << 28
"""Bytes of one member: a quarter of a gigabyte is no picture, but a small file can unpack to it."""
_LARGEST_HEADER = 1 << 16
"""Bytes of a header that describes the next member, its long name or its attributes."""
_MOST_SKIPPED = 1 << 34
"""Bytes of a member that is skipped: passing over what is not there takes tarfile as long as passing over it."""
_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_DAMAGE = (tarfile.TarError, EOFError, OSError, zlib.error, LZMAError, ValueError, OverflowError)
Member = tuple[str, str, bytes | None]
"""(sample, suffix in lower case, content); None where it is too large."""


def rows(path: Path) -> Rows:
    """Yield the samples of a shard, or of all shards in a folder by their names."""
    for shard in shards(path):
        key = ""
        try:
            for key, members in groupby(_members(shard), key=lambda member: member[0]):
                yield f"{shard.name} member {key}", _sample(key, members)
        except _DAMAGE:
            yield f"{shard.name} after {key or 'its start'}", BadRow("damaged tar file")


def count(path: Path) -> int:
    """Return 0: counting would take a pass over all the bytes."""
    del path
    return 0


def shards(path: Path) -> list[Path]:
    return sorted(filter(is_shard, path.rglob("*"))) if path.is_dir() else [path]


def is_shard(path: Path) -> bool:
    """Tell by its name whether a file is a tar file, compressed or not."""
    return ".tar" in path.suffixes or path.suffix == ".tgz"


class _Header(tarfile.TarInfo):
    """A member's header, refused where it would make the reader hold gigabytes or go backwards."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if not 0 <= header.size <= (_LARGEST_HEADER if header.type in _HEADERS else _MOST_SKIPPED):
            raise tarfile.ReadError("a header of impossible size")
        return header


def _members(shard: Path) -> Iterator[Member]:
    with open_file(shard) as handle, tarfile.open(fileobj=handle, mode="r|*", tarinfo=_Header) as archive:
        while (member := archive.next()) is not None:
            # The archive would remember every member it has passed.
            archive.members = []  # type: ignore[attr-defined]
            name = member.name.removeprefix("./")
            folder, slash, file = name.rpartition("/")
            if not member.isfile() or file.startswith("."):
                continue
            stem, _, suffix = file.partition(".")
            content = None
            if member.size <= _LARGEST:
                stream = archive.extractfile(member)
                assert stream is not None
                content = stream.read()
            yield f"{folder}{slash}{stem}", f".{suffix.lower()}", content


def _sample(key: str, members: Iterator[Member]) -> Row | BadRow:
    row: dict[str, Any] = {}
    for _, suffix, content in members:
        if content is None:
            return BadRow("member too large")
        if suffix in SUFFIXES:
            row["image"] = content
        elif suffix == ".json":
            try:
                fields = json.loads(content)
            except (ValueError, RecursionError):
                return BadRow("broken JSON")
            # The picture is the one beside it, not one that the text names.
            row |= (
                {name: value for name, value in fields.items() if name != "image"} if isinstance(fields, dict) else {}
            )
        elif suffix == ".txt":
            row["text"] = content.decode("utf-8", errors="surrogateescape")
    return {"__key__": key, **row}
