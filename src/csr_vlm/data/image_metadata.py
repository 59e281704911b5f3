"""Remove metadata from PNG and JPEG files, so that damage in it does not cost the pixels."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))
"""Chunks that the pixels depend on."""
_MAX_BYTES = 1 << 28
"""Files that are longer are not read again."""
_JPEG_KEPT = frozenset((0xE0, 0xEE))
"""Application segments that decoding depends on: JFIF, and Adobe's color transform."""
_EXIF = b"Exif\0\0"


@dataclass(frozen=True)
class Stripped:
    """Hold an image file without metadata."""

    content: bytes
    exif: bytes | None
    """EXIF block, which may be damaged; None if there is none."""


def without_metadata(file: IO[bytes]) -> Stripped | None:
    """Return a PNG or JPEG file without its metadata; None for any other file."""
    content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        return None
    if content.startswith(_PNG):
        return _strip_png(content)
    return _strip_jpeg(content) if content.startswith(b"\xff\xd8\xff") else None


def _strip_png(content: bytes) -> Stripped:
    kept, exif = [_PNG], None
    for name, chunk in _png_chunks(content):
        if name in _PNG_PIXELS:
            kept.append(chunk)
        elif name == b"eXIf" and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big"):
            exif = _EXIF + chunk[8:-4]
    return Stripped(b"".join(kept), exif)


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (name, chunk with length and checksum); the last one may be cut."""
    offset = len(_PNG)
    while offset + 8 <= len(content):
        end = offset + 12 + int.from_bytes(content[offset : offset + 4], "big")
        yield content[offset + 4 : offset + 8], content[offset:end]
        offset = end


def _strip_jpeg(content: bytes) -> Stripped:
    kept, exif, offset = [content[:2]], None, 2
    while content[offset : offset + 1] == b"\xff" and offset + 4 <= len(content):
        marker = content[offset + 1]
        if marker == 0xFF:  # A fill byte.
            offset += 1
            continue
        if marker == 0xDA:  # The pixels follow.
            break
        end = offset + 2 + int.from_bytes(content[offset + 2 : offset + 4], "big")
        segment = content[offset:end]
        if marker == 0xE1 and segment[4:10] == _EXIF and exif is None:
            exif = segment[4:]
        if marker in _JPEG_KEPT or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(segment)
        offset = end
    return Stripped(b"".join(kept) + content[offset:], exif)
