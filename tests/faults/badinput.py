"""Generate thousands of malformed inputs from a seed.

``cases(seed, number)`` yields them, and ``Case.write`` writes one to a folder. A case defines
which reader reads it (see :mod:`tests.faults.reading`) and, where that is known, how many
rows must be accepted or dropped.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import struct
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, PngImagePlugin

from tests.faults.case import Case, Maker, WrittenCase

MEGABYTE = 1 << 20


def cases(seed: int, number: int, kinds: Mapping[str, tuple[Maker, int]] | None = None) -> Iterator[Case]:
    """Yield ``number`` cases in a random order that depends on the seed.

    Args:
        kinds: Maker and weight by name; all kinds of this module by default.
    """
    weighted = [(name, maker) for name, (maker, weight) in (kinds or FAMILIES).items() for _ in range(weight)]
    order = random.Random(seed)
    deck: list[tuple[str, Maker]] = []
    for index in range(number):
        if not deck:
            deck = order.sample(weighted, len(weighted))
        name, maker = deck.pop()
        yield Case(f"{name} {index}", f"{seed}:{index}:{name}", maker)


# Pictures ---------------------------------------------------------------------------------------

FORMS = {"JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif", "PPM": ".ppm"}


def noise(rng: random.Random, mode: str = "RGB", size: tuple[int, int] | None = None) -> Image.Image:
    size = size or (rng.randint(1, 80), rng.randint(1, 80))
    pixels = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def one_image(folder: Path, content: bytes, expected: str | None = None, name: str = "a.jpg") -> WrittenCase:
    """Write one image and a prompt about it."""
    (folder / name).write_bytes(content)
    return one_row(folder, {"id": "a", "image": name, "text": "What is this?"}, expected)


def one_row(folder: Path, row: Any, expected: str | None = None) -> WrittenCase:
    (folder / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    return WrittenCase("prompts", "prompts.jsonl", 1, expected)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Truncate, change, repeat or delete some bytes, mostly near the start."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        index = rng.randrange(min(len(changed), rng.choice((40, 400, 1 << 30))))
        action = rng.randrange(5)
        if action == 0:
            changed[index] = rng.randrange(256)
        elif action == 1:
            changed[index : index + 4] = rng.choice(
                (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0")
            )
        elif action == 2:
            changed[index:index] = changed[index : index + rng.randint(1, 64)]
        elif action == 3:
            del changed[index : index + rng.randint(1, 64)]
        elif rng.random() < 0.4:
            del changed[index:]
        if not changed:
            break
    return bytes(changed)


def cut_image(folder: Path, rng: random.Random) -> WrittenCase:
    form = rng.choice(list(FORMS))
    whole = encoded(noise(rng, size=(48, 48)), form)
    return one_image(folder, whole[: rng.randrange(len(whole) // 2)], "rejected", f"a{FORMS[form]}")


def damaged_image(folder: Path, rng: random.Random) -> WrittenCase:
    form = rng.choice(list(FORMS))
    return one_image(folder, damaged(encoded(noise(rng), form), rng), name=f"a{FORMS[form]}")


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def image_bomb(folder: Path, rng: random.Random) -> WrittenCase:
    side = rng.choice((1_001, 5_000, 20_000, 65_535, 2**31 - 1))
    small = min(side, 65_535)
    kind = rng.randrange(6)
    if kind == 0:  # a complete image: all pixels are present, compressed to a few kilobytes
        rows = min(side, 20_000)
        bits = zlib.compress(b"\0" * ((rows // 8 + 2) * min(rows, 4_000)), 9)
        header = struct.pack(">IIBBBBB", rows, rows, 1, 0, 0, 0, 0)
        content = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", bits) + png_chunk(b"IEND", b"")
    elif kind == 1:
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        content = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b""))
    elif kind == 2:
        content = b"GIF89a" + struct.pack("<HH", small, small) + encoded(noise(rng), "GIF")[10:]
    elif kind == 3:
        bmp = bytearray(encoded(noise(rng), "BMP"))
        bmp[18:26] = struct.pack("<ii", side, side)
        content = bytes(bmp)
    elif kind == 4:
        content = b"P6 %d %d 255\n" % (side, side)
    else:
        jpeg = bytearray(encoded(noise(rng), "JPEG"))
        start = jpeg.index(b"\xff\xc0")
        jpeg[start + 5 : start + 9] = struct.pack(">HH", small, small)
        content = bytes(jpeg)
    return one_image(folder, content, "rejected", "a.png")


def text_bomb(folder: Path, rng: random.Random) -> WrittenCase:
    """Write an image whose comments are larger than the image itself."""
    info = PngImagePlugin.PngInfo()
    for index in range(rng.randint(1, 8)):
        info.add_text(f"key{index}", "x" * rng.choice((1000, MEGABYTE, 8 * MEGABYTE)), zip=True)
    return one_image(folder, encoded(noise(rng), "PNG", pnginfo=info), name="a.png")


def turned_image(folder: Path, rng: random.Random) -> WrittenCase:
    exif = Image.Exif()
    exif[0x0112] = rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 65_535))
    exif[0x010E] = rng.choice(("", "x" * 60_000, "\0\0", "\u202eabc"))
    form = rng.choice(("JPEG", "PNG", "WEBP", "TIFF"))
    content = encoded(
        noise(rng), form, exif=exif.tobytes() if form == "TIFF" or rng.random() < 0.7 else damaged(exif.tobytes(), rng)
    )
    return one_image(folder, content)


def modes(folder: Path, rng: random.Random) -> WrittenCase:
    form, mode = rng.choice(
        (
            ("JPEG", "CMYK"), ("JPEG", "L"), ("JPEG", "YCbCr"), ("TIFF", "CMYK"), ("TIFF", "LAB"), ("TIFF", "1"),
            ("TIFF", "I"), ("TIFF", "F"), ("PNG", "LA"), ("PNG", "P"), ("PNG", "1"), ("PNG", "RGBA"),
            ("WEBP", "RGBA"), ("GIF", "P"), ("PPM", "L"), ("TIFF", "YCbCr"), ("BMP", "1"), ("BMP", "P"),
        )
    )  # fmt: skip
    rgb = noise(rng)
    image = Image.merge("LAB", rgb.split()) if mode == "LAB" else rgb.convert(mode)
    options: dict[str, Any] = {"icc_profile": rng.randbytes(200)} if rng.random() < 0.3 else {}
    if mode == "P" and form in ("PNG", "GIF"):
        options["transparency"] = rng.choice(
            (0, 255, bytes(rng.randrange(256) for _ in range(20))) if form == "PNG" else (0, 255)
        )
    expected = "rejected" if mode == "F" else None
    return one_image(folder, encoded(image, form, **options), expected)


def sixteen_bits(folder: Path, rng: random.Random) -> WrittenCase:
    levels = np.random.default_rng(rng.randrange(99)).integers(0, 65_536, (9, rng.randint(1, 30)), dtype=np.uint16)
    return one_image(folder, encoded(Image.fromarray(levels), rng.choice(("PNG", "TIFF"))), "accepted")


def animated(folder: Path, rng: random.Random) -> WrittenCase:
    frames = [noise(rng, size=(16, 16)) for _ in range(rng.choice((2, 5, 60)))]
    form = rng.choice(("GIF", "WEBP", "PNG", "TIFF"))
    content = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    return one_image(folder, content if rng.random() < 0.6 else damaged(content, rng), name=f"a{FORMS[form]}")


def odd_sizes(folder: Path, rng: random.Random) -> WrittenCase:
    size, expected = rng.choice(
        (((1, 1), "accepted"), ((1, 5_000), "accepted"), ((5_000, 1), "accepted"), ((1_000, 1_001), "rejected"))
    )
    form = rng.choice(list(FORMS))
    return one_image(folder, encoded(Image.new("RGB", size), form), expected, f"a{FORMS[form]}")


def no_pixels(folder: Path, rng: random.Random) -> WrittenCase:
    content = rng.choice(
        (
            b"P6 0 0 255\n", b"P6 0 9 255\n", b"P6 9 0 255\n", b"P6 -3 9 255\n", b"P6 9 9 0\n", b"P6 9 9 70000\n" + b"a" * 999,
            b"P6 " + b"9" * 5000 + b" 1 255\n", b"P6 " + b" " * 99_999, b"P6\n#" + b"c" * 99_999, b"GIF89a\0\0\0\0\0\0\0;", b"BM", b"II*\0", b"MM\0*\0\0\0\x08\xff\xff",
            b"RIFF\xff\xff\xff\xffWEBP", b"\xff\xd8\xff", b"\xff\xd8" + b"\xff\xe1\xff\xff" * 50, b"", b"\0", b"\0" * 5000,
        )
    )  # fmt: skip
    return one_image(folder, content, "rejected", rng.choice(("a.jpg", "a.png", "a.tif")))


def other_files(folder: Path, rng: random.Random) -> WrittenCase:
    """Write a file of another type under the name of an image."""
    content = rng.choice(
        (
            b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
            b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>',
            b"<html><script>alert(1)</script></html>", b"%PDF-1.7\n%\xe2\xe3\n1 0 obj\n", b"PK\x03\x04" + b"\0" * 99, b"\x7fELF\x02",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n", b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix\x94.",
            b"\0\0\0\x18ftypmp42", b"#!/bin/sh\nexit 1\n", b"{}", rng.randbytes(rng.randint(1, 9_000)), b"/* XPM */ static char *x[] = {",
            b"\0\0\0\x0cjP  \r\n\x87\n", b"id=ImageMagick\n", b"8BPS\0\x01", b"\xd7\xcd\xc6\x9a" + b"\0" * 40,
        )
    )  # fmt: skip
    return one_image(folder, content, "rejected", rng.choice(("a.jpg", "a.png", "a.JPEG", "a.webp", "a")))


def other_formats(folder: Path, rng: random.Random) -> WrittenCase:
    """Write an image in a format that Pillow supports but the package does not."""
    form = rng.choice(("ICO", "TGA", "PCX", "PDF", "EPS", "SGI", "DDS", "ICNS", "IM", "MSP"))
    image = noise(rng, "1" if form == "MSP" else "RGB", (32, 32))
    return one_image(folder, encoded(image, form), "rejected")


def polyglot(folder: Path, rng: random.Random) -> WrittenCase:
    tail = rng.choice((b"<script>x</script>", b"PK\x05\x06" + b"\0" * 18, b"\0" * 100_000, encoded(noise(rng), "PNG")))
    form = rng.choice(("JPEG", "PNG", "GIF"))
    return one_image(folder, encoded(noise(rng), form) + tail, "accepted")


def no_ordinary_file(folder: Path, rng: random.Random) -> WrittenCase:
    path = folder / "a.jpg"
    outside = folder.parent / f"outside-{folder.name}.png"
    outside.write_bytes(encoded(noise(rng), "PNG"))
    kind = rng.choice(("pipe", "folder", "null", "zero", "nowhere", "loop", "outside", "up", "sparse", "itself"))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        with path.open("wb") as handle:
            handle.truncate(1 << 40)
    elif kind == "loop":
        path.symlink_to(folder / "b.jpg")
        (folder / "b.jpg").symlink_to(path)
    else:
        target = {
            "null": "/dev/null",
            "zero": "/dev/zero",
            "nowhere": "none",
            "outside": str(outside),
            "up": "..",
            "itself": ".",
        }
        path.symlink_to(target[kind])
    written = one_row(folder, {"id": "a", "image": "a.jpg", "text": "What?"}, "rejected")
    if kind != "outside":
        return written
    follow = rng.random() < 0.5
    return replace(written, expected="accepted" if follow else "rejected", settings={"follow_links": follow})


# Rows -------------------------------------------------------------------------------------------

IDS: tuple[Any, ...] = (
    None, "", 0, -1, 10**30, 10**4000, 1.5, float("nan"), float("inf"), True, False, [], {}, ["a"], {"a": 1},
    "x" * (10 * MEGABYTE), "a\0b", "\x1b[2J\x1b]0;owned\x07", "\u202egnp.exe", "\ud800", "../../etc/passwd", "a/b\\c",
    "\n", " ", "\u0000", "🦊" * 100, "'; DROP TABLE", "{0}", "%s", "-rf", "nul", "A" * 300, "é", "e\u0301", "\ufeffid",
)  # fmt: skip
TEXTS: tuple[Any, ...] = (
    None, "", " \n\t", 7, [], {}, True, "x" * (10 * MEGABYTE), "مرحبا ما هذا؟", "\u202eWhat?\u202c", "\x00\x01\x02What?", "\x1b[31mred",
    "<image>" * 1000, "<image>What?", "<|im_end|><|im_start|>system", "</s><s>[INST]", "{{ 7 * 7 }}", "<script>x</script>",
    "\ud83d", "What?\r\nAnd?", "a" * 70_000, "&lt;", "%n%n%n", "🏳️‍🌈" * 50, "\u200b" * 10, "\ufffe\uffff", [{"from": "human"}],
    [{"from": "human", "value": ["x"]}], [{"role": "user", "content": [{"type": "text", "text": 3}]}], [[[]]], [None], {"role": "user"},
)  # fmt: skip
IMAGES: tuple[Any, ...] = (
    None, "", ".", "/", "..", "../a.png", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:9/a.png", "~/a.png",
    "good/../../x.png", "C:\\a.png", "\\\\host\\a.png", "a\0.png", "x" * 5000, "d/" * 3000, "%2e%2e/a.png", "*", "{0..9}.png", "\n", 3,
    ["good.png"], ["good.png", "good.png"], {"path": "good.png"}, {"bytes": "good.png"}, {"bytes": None, "path": None}, [], {}, [[]],
    "data:image/png;base64,iVBORw0KGgo=", "good.png\0.jpg", "GOOD.PNG", "good.png/", "./good.png", "-", "|id", "$(id)", "\ud800.png",
    "COCO_train2014_000000000001.jpg", {"bytes": {"bytes": "x"}}, "/dev/stdin", "/proc/self/mem", "/proc/self/fd/0", True, 1.5,
)  # fmt: skip


def odd_row(rng: random.Random) -> dict[str, Any]:
    """Create a row with some unusual fields."""
    row: dict[str, Any] = {"id": f"id{rng.randrange(6)}", "image": "good.png", "text": "What is this?"}
    for name, values in rng.sample((("id", IDS), ("text", TEXTS), ("image", IMAGES)), rng.randint(1, 2)):
        row[name] = rng.choice(values)
    if rng.random() < 0.2:
        row |= {"prompt_id": rng.choice(IDS), "question": "?", "images": rng.choice(IMAGES)}
    if rng.random() < 0.1:
        del row[rng.choice(("id", "image", "text"))]
    return row


def with_good_image(folder: Path) -> None:
    (folder / "good.png").write_bytes(encoded(Image.new("RGB", (4, 4)), "PNG"))


def small_row(rng: random.Random) -> dict[str, Any]:
    """Create an unusual row without a field of ten megabytes; dozens of those only test the disk."""
    while True:
        row = odd_row(rng)
        if all(not isinstance(value, str) or len(value) < MEGABYTE for value in row.values()):
            return row


def odd_lines(folder: Path, rng: random.Random) -> WrittenCase:
    with_good_image(folder)
    rows = [small_row(rng) for _ in range(rng.randint(1, 30))]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return WrittenCase("prompts", "prompts.jsonl", len(rows))


def odd_line(folder: Path, rng: random.Random) -> WrittenCase:
    with_good_image(folder)
    return one_row(folder, odd_row(rng))


BROKEN_LINES = (
    b"{", b"}", b"[1, 2]", b'"text"', b"null", b"NaN", b'{"id": "\xff"}', b"9" * 5000, b"[" * 100_000, b'{"a":' * 50_000, b"\xef\xbb\xbf{",
    b'{"id": 1e99999, "image": "good.png", "text": "x"}', b'{"id": 1, "id": 2,}', b"{'id': 1}", b"\0" * 100, b"\xff\xfe{\0}\0", b"\x85", b"\xe2\x80\xa8",
    b'{"id": "a", "image": "good.png", "text": "\t"}', b'{"id": "\\ud800"}', b"// comment", b"---", b"\x1b[2J", b'{"id": 0x1}', b"[" * 900 + b"]" * 900,
)  # fmt: skip


def broken_lines(folder: Path, rng: random.Random) -> WrittenCase:
    with_good_image(folder)
    good = b'{"id": "good", "image": "good.png", "text": "What?"}'
    lines = [rng.choice((good, rng.choice(BROKEN_LINES), rng.choice(BROKEN_LINES))) for _ in range(rng.randint(1, 12))]
    lines = [damaged(line, rng) if rng.random() < 0.2 else line for line in lines]
    content = b"\n".join(line.replace(b"\n", b" ") for line in lines)
    (folder / "prompts.jsonl").write_bytes(content)
    return WrittenCase("prompts", "prompts.jsonl", sum(bool(line.strip()) for line in content.split(b"\n")))


def endless_line(folder: Path, rng: random.Random) -> WrittenCase:
    """Write a file with a line that is too long to be held in memory."""
    good = b'{"id": "good", "image": "good.png", "text": "What?"}\n'
    with_good_image(folder)
    with (folder / "prompts.jsonl").open("wb") as handle:
        handle.write(good)
        handle.write(rng.choice((b'{"id": "', b"[", b"")))
        handle.seek(handle.tell() + rng.choice((40, 150, 400)) * MEGABYTE)
        handle.write(b"\n" + good.replace(b'"good"', b'"last"'))
    return WrittenCase("prompts", "prompts.jsonl", 3)


ARRAYS = (
    b"[", b"[]", b"[,]", b"[{}", b"[{},]", b"{}", b"[[{}]]", b"[1 2]", b"[{}] garbage", b"[" + b"[" * 100_000, b'["' + b"x" * 99_999,
    b"[{}, {}", b"[1.5, 1e9, -", b"[nul]", b"[" + b"9" * 6000 + b"]", b"[\xff]", b"[\0]", b" [ { } ] ", b"[{}]\n[{}]", b'[{"id": 1}, {"id": 2', b"[NaN]",
)  # fmt: skip


def broken_array(folder: Path, rng: random.Random) -> WrittenCase:
    with_good_image(folder)
    if rng.random() < 0.5:
        content = rng.choice(ARRAYS)
    else:
        rows = [small_row(rng) for _ in range(rng.randint(1, 9))]
        content = json.dumps(rows).encode()
        content = content if rng.random() < 0.3 else damaged(content, rng)
    (folder / "prompts.json").write_bytes(content)
    return WrittenCase("prompts", "prompts.json", settings={"format": "llava"} if rng.random() < 0.5 else {})


def endless_entry(folder: Path, rng: random.Random) -> WrittenCase:
    with (folder / "prompts.json").open("wb") as handle:
        handle.write(rng.choice((b'[{"id": "', b"[{}", b"[")))
        handle.seek(handle.tell() + 100 * MEGABYTE)
        handle.write(b"]")
    return WrittenCase("prompts", "prompts.json", expected="rejected")


def odd_csv(folder: Path, rng: random.Random) -> WrittenCase:
    with_good_image(folder)
    lines = ["file_name,question,id"]
    for number in range(rng.randint(1, 9)):
        image, text = (
            rng.choice(IMAGES),
            rng.choice(("What?", '"open', "a,b,c,d", '"x""', "\0", "x" * 200_000, "\u202e", "")),
        )
        name = image if isinstance(image, str) and image.isprintable() else "good.png"
        lines.append(f"{name},{text},{number}")
    content = "\n".join(lines).encode("utf-8", "surrogateescape")
    (folder / "metadata.csv").write_bytes(content if rng.random() < 0.6 else damaged(content, rng))
    return WrittenCase("prompts", ".", settings={"format": "imagefolder"})


def large_field(folder: Path, rng: random.Random) -> WrittenCase:
    """Write a table with one field that is too long; only its row may be dropped."""
    with_good_image(folder)
    long = "x" * rng.choice((131_073, 200_000, 10 * MEGABYTE))
    (folder / "metadata.csv").write_text(
        f"file_name,question,id\ngood.png,{long},1\ngood.png,What?,2\ngood.png,What?,3\n"
    )
    return WrittenCase("prompts", ".", 3)


# Containers -------------------------------------------------------------------------------------


def odd_columns(rng: random.Random) -> dict[str, pa.Array]:
    number = rng.randint(0, 6)
    good: dict[str, pa.Array] = {
        "id": pa.array([f"id{index}" for index in range(number)], pa.string()),
        "image": pa.array(["good.png"] * number, pa.string()),
        "text": pa.array(["What?"] * number, pa.string()),
    }
    unusual = [
        pa.array([b"\xff\xfe"] * number, pa.binary()), pa.array([2**62] * number, pa.timestamp("ns")), pa.array([10**15] * number, pa.timestamp("ms")),
        pa.array([None] * number, pa.null()), pa.array([[["x"]]] * number), pa.array([{"bytes": b"", "path": "\0"}] * number, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        pa.array([float("nan")] * number, pa.float32()), pa.array(["good.png"] * number).dictionary_encode(), pa.array([10**12] * number, pa.duration("ns")),
        pa.array([[("a", 1)]] * number, pa.map_(pa.string(), pa.int8())), pa.array(["a"] * number, pa.large_string()), pa.array([True] * number, pa.bool_()),
    ]  # fmt: skip
    if number:
        unusual.append(
            pa.StringArray.from_buffers(
                number,
                pa.array([number] * 0 + list(range(number + 1)), pa.int32()).buffers()[1],
                pa.py_buffer(b"\xff" * number),
            )
        )
    return good | {rng.choice(list(good)): rng.choice(unusual)}


def odd_parquet(folder: Path, rng: random.Random) -> WrittenCase:
    with_good_image(folder)
    table = pa.table(odd_columns(rng))
    pq.write_table(table, folder / "prompts.parquet", compression=rng.choice(("zstd", "snappy", "none")))
    return WrittenCase("prompts", "prompts.parquet", table.num_rows)


def damaged_parquet(folder: Path, rng: random.Random) -> WrittenCase:
    with_good_image(folder)
    buffer = io.BytesIO()
    rows = {"id": [f"{n}" for n in range(200)], "image": ["good.png"] * 200, "text": ["What is this?"] * 200}
    pq.write_table(pa.table(rows), buffer, row_group_size=rng.choice((10, 64, 200)))
    content = buffer.getvalue()
    kind = rng.randrange(4)
    if kind == 0:
        content = content[: rng.randrange(len(content))]
    elif kind == 1:  # the footer holds the offsets of all columns
        tail = bytearray(content)
        for _ in range(rng.randint(1, 8)):
            tail[-rng.randint(1, min(len(tail), 900))] = rng.randrange(256)
        content = bytes(tail)
    elif kind == 2:
        content = content[:-8] + struct.pack("<I", rng.choice((0, 2**31, 2**32 - 1, 4))) + b"PAR1"
    else:
        content = damaged(content, rng)
    (folder / "prompts.parquet").write_bytes(content)
    return WrittenCase("prompts", "prompts.parquet")


def tar_with(folder: Path, members: list[tuple[tarfile.TarInfo, bytes]], rng: random.Random) -> Path:
    path = folder / "shard.tar"
    with tarfile.open(path, "w", format=rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def odd_tar(folder: Path, rng: random.Random) -> WrittenCase:
    members = []
    for number in range(rng.randint(1, 8)):
        stem = rng.choice(
            (
                f"s{number}",
                "../../up",
                "/etc/passwd",
                "s" * 300,
                "a\u202eb",
                "same",
                "x\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
            )
        )
        member = tarfile.TarInfo(stem + rng.choice((".jpg", ".json", ".txt", "", ".tar", ".JPG")))
        member.type = rng.choice(
            (tarfile.REGTYPE,) * 4
            + (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE)
        )
        member.linkname = "/etc/passwd" if member.type in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
        content = rng.choice(
            (encoded(noise(rng), "PNG"), b"{", b'{"text": "What?", "image": "/etc/passwd"}', b"What?", b"", b"\xff")
        )
        members.append((member, content if member.isreg() else b""))
    path = tar_with(folder, members, rng)
    if rng.random() < 0.5:
        path.write_bytes(damaged(path.read_bytes(), rng))
    if rng.random() < 0.3:
        (folder / "shard.tar.gz").write_bytes(gzip.compress(path.read_bytes())[: rng.choice((None, 40, 200))])
        return WrittenCase("prompts", "shard.tar.gz")
    return WrittenCase("prompts", "shard.tar")


def tar_header(name: bytes, size: bytes, kind: bytes) -> bytes:
    head = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size + b"00000000000\0" + b" " * 8 + kind
    head = head.ljust(257, b"\0") + b"ustar\0" + b"00"
    head = head.ljust(512, b"\0")
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]


def tar_bomb(folder: Path, rng: random.Random) -> WrittenCase:
    """Write archives whose headers declare gigabytes, with and without compression."""
    sizes = (
        b"77777777777\0",
        b"00000000000\0",
        b"\x80" + b"\0" * 6 + b"\xff" * 5,
        b"\xff" * 12,
        b"-0000000001\0",
        b"abc\0\0\0\0\0\0\0\0\0",
        b"30000000000\0",
    )
    kinds = (b"x", b"g", b"L", b"K", b"S", b"0", b"7", b"X", b"5")
    bodies = (
        b"\0" * 1024,
        b"30 size=-512\n".ljust(512, b"\0"),
        b"20 path=\xff\xfe\n".ljust(512, b"\0"),
        b"9" * 60_000 + b" a=b\n",
        b"0 =\n".ljust(512, b"\0"),
    )
    content = b"".join(
        tar_header(b"a.jpg", rng.choice(sizes), rng.choice(kinds)) + rng.choice(bodies)
        for _ in range(rng.randint(1, 4))
    )
    if rng.random() < 0.5:
        (folder / "shard.tar").write_bytes(content)
        return WrittenCase("prompts", "shard.tar")
    with gzip.open(folder / "shard.tar.gz", "wb", compresslevel=1) as handle:
        handle.write(content)
        for _ in range(rng.choice((1, 100))):
            handle.write(b"\0" * MEGABYTE)
    return WrittenCase("prompts", "shard.tar.gz")


def saved_data_set(folder: Path, rng: random.Random) -> WrittenCase:
    """Write a dataset with save_to_disk and damage one of its files."""
    from datasets import Dataset

    Dataset.from_dict({"id": ["a", "b"], "image": ["good.png"] * 2, "text": ["What?"] * 2}).save_to_disk(
        str(folder / "set")
    )
    with_good_image(folder / "set")
    victim = rng.choice(sorted(path for path in (folder / "set").iterdir() if path.suffix in (".json", ".arrow")))
    content = victim.read_bytes()
    replaced = rng.choice(
        (
            damaged(content, rng),
            b"",
            b"{}",
            b"[]",
            b"null",
            b"\xff",
            content.replace(b"Value", b"Nothing"),
            content[: len(content) // 2],
        )
    )
    victim.write_bytes(replaced)
    return WrittenCase("prompts", "set")


def odd_source(folder: Path, rng: random.Random) -> WrittenCase:
    """Name a source that matches no file, too many files, or a device."""
    with_good_image(folder)
    target = rng.choice(
        (
            "a\0b", "x" * 5000, "p{0..99999999999}.tar", "p{9..1}.tar", "{0..9}{0..9}", "**", "*", "[", "nowhere/*.jsonl", "", ".", "good.png", "/dev/zero",
            "/dev/null", "/proc/self/mem", "a/b", "-", "hub/none", "http://127.0.0.1:9/x.jsonl", "s3://bucket/key", "~", "\ud800", "\n", "d/" * 2000, "/",
            "fifo",
        )
    )  # fmt: skip
    if target == "fifo":
        os.mkfifo(folder / "fifo")
    absolute = target.startswith(("/", "~", "http", "s3", "hub", "a/b")) or not target
    settings = {
        "format": rng.choice(
            ("auto", "auto", "auto", "jsonl", "llava", "parquet", "webdataset", "images", "imagefolder")
        )
    }
    if target == "/":
        settings = {"format": "jsonl"}
    return WrittenCase(
        "prompts",
        target if absolute else str(folder / target),
        expected="rejected" if target not in (".", "*", "**", "good.png", "") else None,
        settings=settings,
    )


def odd_pairs(folder: Path, rng: random.Random) -> WrittenCase:
    with_good_image(folder)
    rows = []
    for _ in range(rng.randint(1, 9)):
        sides = (
            None,
            "",
            3,
            [],
            "A cat.",
            "\ud800",
            [{"role": "assistant", "content": "x"}],
            {"from": "gpt", "value": "x"},
            "x" * 70_000,
            [None],
            "\x1b[2J",
        )
        row = small_row(rng) | {"chosen": rng.choice(sides), "rejected": rng.choice(sides)}
        if rng.random() < 0.3:
            row |= {
                "rejected_response": rng.choice(sides),
                "messages": rng.choice((None, [], [{}], "x", [{"role": "assistant", "content": "y"}])),
            }
        if rng.random() < 0.3:
            row |= {"rejected_conversations": rng.choice(sides), "conversations": rng.choice(sides)}
        rows.append(row)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return WrittenCase("pairs", "pairs.jsonl", len(rows))


# Configuration ----------------------------------------------------------------------------------

REQUIRED = "model: {path: m}\nscorer: {path: s}\ndata: {prompts: p.jsonl}\n"


def bomb(depth: int, width: int = 9) -> str:
    """Return nested lists of aliases: a kilobyte of YAML that expands to width ** depth words."""
    lines = ["a0: &a0 [lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, depth)]
    return "\n".join(lines) + f"\nx: *a{depth - 1}\n"


RECIPES = (
    bomb(9), bomb(30), bomb(60, 2), f"{bomb(20)}preset: *a19\n", f"{REQUIRED}method: &m {{lambda: *m}}\n", "a: &a [*a]\npreset: *a\n", "&a [*a]", f"{REQUIRED}seed: &s {{? *s : 1}}\n",
    "[" * 50_000, "{a: " * 50_000, "- " * 50_000, "? " * 20_000, "!!python/object/apply:os.system [id]", "x: !!python/name:os.system", f"{REQUIRED}seed: !!python/object:x {{}}",
    f"{REQUIRED}seed: {'9' * 6000}", f"{REQUIRED}seed: 1e999999", f"{REQUIRED}seed: .nan", f"{REQUIRED}seed: -1", f"{REQUIRED}seed: 0x{'f' * 9000}", f"{REQUIRED}seed: 1:1:1:1:1", f"{REQUIRED}iterations: {10**30}",
    f"{REQUIRED}seed: 2020-99-99", f"{REQUIRED}seed: 2020-01-01T99:99:99", f"{REQUIRED}seed: !!binary '***'", f"{REQUIRED}seed: !!int x", f"{REQUIRED}seed: !!float x", f"{REQUIRED}1: 2", f"{REQUIRED}? [a]\n: b",
    f"{REQUIRED}null: 1", f"{REQUIRED}? {{a: b}}\n: c", f"{REQUIRED}2020-01-01: 1", "<<: [1]\n", "<<: &a {<<: *a}\n", "\t", "", "[]", "3", "null", "a: b: c", "a: [", "\0", "\x1b[2J", "%YAML 9.9\n---\n", "---\n---\n", "@", "`",
    "model: 3", "model: []", "data: {prompts: []}", "data: {prompts: ['']}", "data: {prompts: {}}", f"{REQUIRED}method: {{lambda: .inf}}", f"{REQUIRED}method: {{reward: {{text_scale: 1e400}}}}",
    f"{REQUIRED}evaluation: {{stop_if: ['{'(' * 3000}']}}", f"{REQUIRED}preset: [1]", f"{REQUIRED}preset: {{a: b}}", f"{REQUIRED}preset: {'x' * 100_000}", f"{REQUIRED}training: {{trl: {{a: {'[' * 200}{']' * 200}}}}}",
    f"{REQUIRED}method: {{pairs: {{questions: {{pattern: '(a+)+$', question: '{{0.__class__}}'}}}}}}", f"{REQUIRED}method: {{pairs: {{questions: {{pattern: '(', question: x}}}}}}",
    f"{REQUIRED}method: {{pairs: {{questions: {{pattern: '(a)', question: '{{0:>999999999999}}'}}}}}}", f"{REQUIRED}method: {{pairs: {{questions: {{pattern: '(a)', question: '{{0:>999999999}}'}}}}}}",
    f"{REQUIRED}scorer: {{path: 'python:os:system'}}", f"{REQUIRED}scorer: {{path: x, name: '../../a'}}", f"{REQUIRED}generation: {{prompts_per_part: 0}}", f"{REQUIRED}generation: {{max_rows: {10**40}}}",
    f"{REQUIRED}sed: 1\n", f"{REQUIRED}metod: {{}}\n", f"{REQUIRED}\u202emethod: 1\n", f"{REQUIRED}data: {{prompts: \"a\\0b\"}}", "# only a comment", "a: |\n" + "  x\n" * 100_000, "'" * 9999, "a: &a\nb: *c",
    f"{REQUIRED}iterations: &n 2\nseed: *n\n", REQUIRED, f"{REQUIRED}method: {{lambda: 1e-1}}", "\ufeff" + REQUIRED, REQUIRED + "...\n", REQUIRED * 2,
)  # fmt: skip


def odd_recipe(folder: Path, rng: random.Random) -> WrittenCase:
    text = rng.choice(RECIPES)
    content = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        content = damaged(content, rng)
    elif rng.random() < 0.05:
        content = rng.choice(
            (
                rng.randbytes(300),
                content.decode().encode("utf-16"),
                content + b"#" * (10 * MEGABYTE),
                REQUIRED.encode() + b"x: [" + b"a, " * (3 * MEGABYTE),
            )
        )
    (folder / "recipe.yaml").write_bytes(content)
    return WrittenCase("recipe", "recipe.yaml")


def odd_override(folder: Path, rng: random.Random) -> WrittenCase:
    (folder / "recipe.yaml").write_text(REQUIRED)
    keys = (
        "seed",
        "method.lambda",
        "data.limit",
        "a.b.c",
        ".",
        "seed.x",
        "",
        "training.trl.x",
        "method.search.filters.min_chars",
        "data.questions",
        "." * 5000,
        "a." * 5000 + "a",
    )
    values = (
        "",
        "[" * 9999,
        "9" * 9999,
        "1e999",
        ".nan",
        "&a [*a]",
        "\0",
        "\u202e",
        "!!python/name:os.system",
        "2020-99-99",
        "{a: b}",
        "x=y",
        "-1",
        "!!timestamp x",
        bomb(9).replace("\n", " "),
    )
    return WrittenCase("recipe", "recipe.yaml", settings={"overrides": [f"{rng.choice(keys)}={rng.choice(values)}"]})


# Weights ----------------------------------------------------------------------------------------


def tensor_file(rng: random.Random) -> bytes:
    """Create a safetensors file whose header does not match its content."""
    body = rng.randbytes(64)
    entries: dict[str, Any] = {"a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}
    entries["a"] |= rng.choice(
        (
            {}, {"shape": [4, 5]}, {"shape": [-1, 4]}, {"shape": [2**62, 4]}, {"shape": []}, {"dtype": "F99"}, {"dtype": 3}, {"data_offsets": [0, 65]},
            {"data_offsets": [64, 0]}, {"data_offsets": [-64, 0]}, {"data_offsets": [0, 2**63]}, {"shape": None}, {"data_offsets": []},
        )
    )  # fmt: skip
    if rng.random() < 0.2:
        entries |= {"b": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}
    header = json.dumps(entries).encode()
    length = rng.choice((len(header),) * 6 + (0, 2**63, 2**40, len(header) + 900, 1))
    content = struct.pack("<Q", length) + header + body
    return rng.choice(
        (content, content, damaged(content, rng), content[:7], content[: len(content) - 30], b"", b"PK\x03\x04", header)
    )


def odd_weights(folder: Path, rng: random.Random) -> WrittenCase:
    (folder / "model.safetensors").write_bytes(tensor_file(rng))
    return WrittenCase("weights", "model.safetensors")


def odd_bin(folder: Path, rng: random.Random) -> WrittenCase:
    """Write a .bin file, which is a pickle; a hostile one would execute code when unpickled."""
    import torch

    marker = folder / "ran"
    hostile = b"cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    buffer = io.BytesIO()
    torch.save(rng.choice(({"a": torch.zeros(3)}, [torch.zeros(3)], {"a": 3}, {3: torch.zeros(1)})), buffer)
    content = rng.choice(
        (
            hostile,
            hostile,
            b"\x80\x02" + hostile,
            damaged(buffer.getvalue(), rng),
            buffer.getvalue(),
            buffer.getvalue()[:100],
            b"",
        )
    )
    (folder / "pytorch_model.bin").write_bytes(content)
    return WrittenCase("weights", "pytorch_model.bin")


def odd_index(folder: Path, rng: random.Random) -> WrittenCase:
    content = rng.choice(
        (
            b"", b"{", b"[]", b"null", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 3}}', b'{"weight_map": {"a": "../../x.safetensors"}}', b"\xff",
            b'{"weight_map": {"a": "/etc/passwd"}}', b'{"weight_map": {"a": "none.safetensors"}}', b'{"weight_map": {}}', b'{"weight_map": {"a": "model.safetensors.index.json"}}', b"[" * 99_999,
        )
    )  # fmt: skip
    (folder / "model.safetensors.index.json").write_bytes(content)
    return WrittenCase("checkpoint", ".", expected="rejected" if b"{}}" not in content else None)


def odd_adapter(folder: Path, rng: random.Random) -> WrittenCase:
    from safetensors.numpy import save

    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    right = save({name: np.zeros((4, 128), np.float32)})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": None}
    config |= rng.choice(
        (
            {},
            {"r": -1},
            {"r": 10**9},
            {"peft_type": "NONE"},
            {"peft_type": 3},
            {"target_modules": "("},
            {"target_modules": ["nothing"]},
            {"auto_mapping": {"base_model_class": "os.system", "parent_library": "os"}},
            {"unknown_key": 1},
            {"r": "x"},
            {"lora_alpha": None},
            {"base_model_name_or_path": "../../x"},
        )
    )
    text = json.dumps(config).encode()
    (folder / "adapter_config.json").write_bytes(
        rng.choice((text, text, text, text[:20], b"", b"[]", b"null", b"\xff", damaged(text, rng)))
    )
    (folder / "adapter_model.safetensors").write_bytes(
        rng.choice((right, right[:40], tensor_file(rng), damaged(right, rng)))
    )
    return WrittenCase("adapter", ".", expected="rejected")


def odd_model(folder: Path, rng: random.Random) -> WrittenCase:
    """Copy the shipped model with one of its files damaged."""
    from csr_vlm.world.demo import assets

    sources = [path for path in sorted((assets() / "llava").iterdir()) if path.is_file()]
    victim = rng.choice([path for path in sources if path.suffix in (".json", ".safetensors")])
    for path in sources:
        if path != victim:
            (folder / path.name).symlink_to(path)
    content = victim.read_bytes()
    replaced = rng.choice(
        (content[: len(content) // 2], b"", b"{}", b"[]", b"null", b"\xff\xfe", damaged(content, rng))
    )
    (folder / victim.name).write_bytes(replaced)
    return WrittenCase("model", ".")


# Runs -------------------------------------------------------------------------------------------


def odd_run(folder: Path, rng: random.Random) -> WrittenCase:
    """Write a run with a finished iteration, and damage, replace or delete one of its files."""
    from tests.faults.runs import write_run

    write_run(folder / "run")
    files = sorted(path for path in (folder / "run").rglob("*") if path.is_file() and path.name != ".lock")
    victim = rng.choice(files)
    content = victim.read_bytes()
    other = rng.choice(files).read_bytes()
    replaced = rng.choice(
        (
            content[: len(content) // 2],
            b"",
            b"{}",
            b"[]",
            b"null",
            b"\xff\xfe\0",
            other,
            b"[" * 99_999,
            None,
            "pipe",
            "folder",
            *[damaged(content, rng)] * 4,
        )
    )
    victim.unlink()
    if replaced == "pipe":
        os.mkfifo(victim)
    elif replaced == "folder":
        victim.mkdir()
    elif isinstance(replaced, bytes):
        victim.write_bytes(replaced)
    return WrittenCase("run", "run", settings={"victim": str(victim.relative_to(folder))})


def odd_values(folder: Path, rng: random.Random) -> WrittenCase:
    """Write a run and change a value of one of its markers; the marker stays valid JSON."""
    from tests.faults.runs import write_run

    write_run(folder / "run")
    victim = rng.choice(sorted((folder / "run").rglob("done/*.json")))
    document = json.loads(victim.read_text())
    key = rng.choice(sorted(document))
    document[key] = rng.choice(
        (None, -1, "x", [], {}, 10**40, float("nan"), True, "<script>alert(1)</script>", {"a": {"b": []}})
    )
    if rng.random() < 0.3:
        del document[key]
    victim.write_text(json.dumps(document))
    return WrittenCase("run", "run", settings={"victim": f"{victim.relative_to(folder)}: {key}"})


FAMILIES: dict[str, tuple[Maker, int]] = {
    "cut image": (cut_image, 6),
    "damaged image": (damaged_image, 14),
    "image bomb": (image_bomb, 6),
    "comment bomb": (text_bomb, 1),
    "turned image": (turned_image, 4),
    "image mode": (modes, 5),
    "16-bit image": (sixteen_bits, 1),
    "animated image": (animated, 3),
    "odd size": (odd_sizes, 3),
    "no pixels": (no_pixels, 4),
    "no image": (other_files, 4),
    "format not asked for": (other_formats, 2),
    "image and more": (polyglot, 2),
    "no ordinary file": (no_ordinary_file, 4),
    "odd row": (odd_line, 8),
    "odd rows": (odd_lines, 5),
    "broken JSON Lines": (broken_lines, 5),
    "endless line": (endless_line, 1),
    "broken JSON array": (broken_array, 4),
    "endless JSON entry": (endless_entry, 1),
    "odd CSV": (odd_csv, 3),
    "large CSV field": (large_field, 1),
    "odd Parquet": (odd_parquet, 4),
    "damaged Parquet": (damaged_parquet, 6),
    "odd tar": (odd_tar, 4),
    "tar bomb": (tar_bomb, 4),
    "damaged data set": (saved_data_set, 2),
    "odd source": (odd_source, 4),
    "odd pairs": (odd_pairs, 4),
    "odd recipe": (odd_recipe, 8),
    "odd override": (odd_override, 2),
    "odd safetensors": (odd_weights, 3),
    "odd .bin": (odd_bin, 2),
    "odd index": (odd_index, 2),
    "odd adapter": (odd_adapter, 3),
    "damaged model": (odd_model, 2),
    "damaged run": (odd_run, 8),
    "tampered marker": (odd_values, 4),
}
