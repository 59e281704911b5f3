"""Remove metadata from PNG, JPEG, WebP and GIF files, so that damage in it does not cost the pixels."""

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
_JPEG_SHORTEST = {0xE0: 16, 0xEE: 14}
"""Bytes, with the length, of the shortest such segment; decoders ignore shorter ones, and Pillow fails on them."""
_WEBP_PIXELS = frozenset((b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"))
_WEBP_METADATA = (b"ICCP", b"EXIF", b"XMP ")
_WEBP_METADATA_FLAGS = 0x20 | 0x08 | 0x04
_EXIF = b"Exif\0\0"


@dataclass(frozen=True)
class Stripped:
    """Hold an image file without metadata."""

    content: bytes
    exif: bytes | None
    """EXIF block, which may be damaged; None if there is none."""


def without_metadata(file: IO[bytes]) -> Stripped | None:
    """Return a PNG, JPEG, WebP or GIF file without its metadata; None for any other file."""
    content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        return None
    if content.startswith(_PNG):
        return _strip_png(content)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return _strip_webp(content)
    if content[:4] == b"GIF8":
        return _strip_gif(content)
    return _strip_jpeg(content) if content.startswith(b"\xff\xd8\xff") else None


def _strip_png(content: bytes) -> Stripped:
    kept, exif = [_PNG], None
    for name, chunk in _png_chunks(content):
        if name == b"tRNS" and len(chunk) - 12 not in _png_transparency_lengths(content):
            continue
        if name in _PNG_PIXELS:
            kept.append(chunk)
        elif name == b"eXIf" and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big"):
            exif = _EXIF + chunk[8:-4]
    return Stripped(b"".join(kept), exif)


def _png_transparency_lengths(content: bytes) -> range:
    """Return the lengths that the transparency of a PNG may have, by its color type; decoders ignore any other."""
    color_type = content[len(_PNG) + 17 : len(_PNG) + 18]
    return {b"\0": range(2, 3), b"\2": range(6, 7), b"\3": range(1, 257)}.get(color_type, range(0))


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
        if (marker in _JPEG_KEPT and len(segment) >= 2 + _JPEG_SHORTEST[marker]) or not (
            0xE0 <= marker <= 0xEF or marker == 0xFE
        ):
            kept.append(segment)
        offset = end
    return Stripped(b"".join(kept) + content[offset:], exif)


def _strip_webp(content: bytes) -> Stripped:
    """Keep the chunks of the pixels; behind a chunk of metadata with a wrong length, look for the next one by name."""
    kept, exif, offset = list[bytes](), None, 12
    while offset + 8 <= len(content):
        name, length = content[offset : offset + 4], int.from_bytes(content[offset + 4 : offset + 8], "little")
        end = offset + 8 + length + length % 2
        if name in _WEBP_PIXELS:
            body = bytearray(content[offset + 8 : offset + 8 + length])
            if name == b"VP8X" and body:
                body[0] &= ~_WEBP_METADATA_FLAGS
            # A truncated chunk keeps its length, by which the decoder notices.
            kept.append(name + length.to_bytes(4, "little") + bytes(body) + b"\0" * (len(body) % 2))
        else:
            if not _starts_webp_chunk(content, end):
                end = _next_webp_chunk(content, offset + 4)
            if name == b"EXIF":
                block = content[offset + 8 : end]
                exif = block if block.startswith(_EXIF) else _EXIF + block
        offset = end
    chunks = b"".join(kept)
    return Stripped(b"RIFF" + (4 + len(chunks)).to_bytes(4, "little") + b"WEBP" + chunks, exif)


def _starts_webp_chunk(content: bytes, offset: int) -> bool:
    """Return whether a chunk may start here; the file may also end here."""
    return offset == len(content) or content[offset : offset + 4] in (*_WEBP_PIXELS, *_WEBP_METADATA)


def _next_webp_chunk(content: bytes, offset: int) -> int:
    """Return where the next known chunk starts; the length of the file if there is none."""
    found = (content.find(name, offset) for name in (*_WEBP_PIXELS, *_WEBP_METADATA))
    return min((position for position in found if position >= 0), default=len(content))


def _strip_gif(content: bytes) -> Stripped:
    """Remove comments, application data and damaged extensions; keep a well-formed one about transparency."""
    palette = 3 << ((content[10] & 7) + 1) if len(content) > 10 and content[10] & 0x80 else 0
    offset = 13 + palette
    kept = [content[:offset]]
    while content[offset : offset + 1] == b"!":
        end = offset + 2
        while end < len(content) and content[end]:
            end += 1 + content[end]
        extension = content[offset : end + 1]
        if extension[1:3] == b"\xf9\x04" and len(extension) == 8:
            kept.append(extension)
        offset = end + 1
    return Stripped(b"".join(kept) + content[offset:], None)
