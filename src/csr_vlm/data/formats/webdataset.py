"""Read WebDataset: tar files in which adjacent members with the same stem are one sample, a.jpg beside a.json or a.txt.

Members are read as a stream and never extracted, so their names cannot lead to files on disk.
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

from csr_vlm.data.images import SUFFIXES
from csr_vlm.data.rows import BadRow, Row, Rows, open_source_file

_MAX_MEMBER_BYTES = 1 << 28
"""No picture takes 256 MiB, but a small compressed file can unpack to it."""
_MAX_HEADER_BYTES = 1 << 16
"""Limit for a header that describes the next member: a long name or attributes."""
_MAX_SKIPPED_BYTES = 1 << 34
"""Limit for a member that is skipped, since tarfile takes as long to skip absent data as to skip real data."""
_HEADER_TYPES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_READ_ERRORS = (tarfile.TarError, EOFError, OSError, zlib.error, LZMAError, ValueError, OverflowError)
Member = tuple[str, str, bytes | None]
"""(sample key, suffix in lower case, content); the content is None if it is too large."""


def rows(path: Path) -> Rows:
    """Yield the samples of a shard, or of all shards in a folder in the order of their names."""
    for shard in shards(path):
        key = ""
        try:
            for key, members in groupby(_members(shard), key=lambda member: member[0]):
                yield f"{shard.name} member {key}", _sample(key, members)
        except _READ_ERRORS:
            yield f"{shard.name} after {key or 'its start'}", BadRow("damaged tar file")


def count(path: Path) -> int:
    """Return 0, since counting would read all bytes."""
    del path
    return 0


def shards(path: Path) -> list[Path]:
    """Return the file itself, or all shards below a folder, sorted."""
    return sorted(filter(is_shard, path.rglob("*"))) if path.is_dir() else [path]


def is_shard(path: Path) -> bool:
    """Return whether a file is named like a tar file, compressed or not."""
    return ".tar" in path.suffixes or path.suffix == ".tgz"


class _Header(tarfile.TarInfo):
    """Reject headers whose sizes would make tarfile hold gigabytes or seek backward."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Parse a header.

        Raises:
            tarfile.ReadError: Its size is out of range.
        """
        header = super().frombuf(buf, encoding, errors)
        if not 0 <= header.size <= (_MAX_HEADER_BYTES if header.type in _HEADER_TYPES else _MAX_SKIPPED_BYTES):
            raise tarfile.ReadError("header size out of range")
        return header


def _members(shard: Path) -> Iterator[Member]:
    with open_source_file(shard) as handle, tarfile.open(fileobj=handle, mode="r|*", tarinfo=_Header) as archive:
        while (member := archive.next()) is not None:
            # The archive would keep a list of every member it has read.
            archive.members = []  # type: ignore[attr-defined]
            name = member.name.removeprefix("./")
            folder, slash, file = name.rpartition("/")
            if not member.isfile() or file.startswith("."):
                continue
            stem, _, suffix = file.partition(".")
            content = None
            if member.size <= _MAX_MEMBER_BYTES:
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
            if isinstance(fields, dict):
                # The image is the member beside it, not a name in the JSON.
                row |= {name: value for name, value in fields.items() if name != "image"}
        elif suffix == ".txt":
            row["text"] = content.decode("utf-8", errors="surrogateescape")
    return {"__key__": key, **row}
