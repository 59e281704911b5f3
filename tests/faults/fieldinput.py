"""Generate the kinds of inputs that people bring: odd but readable rows, pairs of other programs, links, metadata.

Most cases have one right outcome. Each is derived from a case of ``tests/data/field`` by a random choice of its parts.
"""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.exchange_rows import OTHERS
from tests.faults.case import MOST_PIXELS, Maker, WrittenCase

QUESTION = "What is it?"


def picture(rng: random.Random, form: str = "PNG", size: tuple[int, int] | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGB", size or (rng.randint(2, 60), rng.randint(2, 60)), tuple(rng.randbytes(3)))
    image.save(buffer, form, **options)
    return buffer.getvalue()


def write_rows(folder: Path, stem: str, rows: list[dict[str, Any]], rng: random.Random) -> str:
    """Write rows as JSON Lines, a JSON array, Parquet or a saved dataset, perhaps with a byte order mark."""
    form = rng.choice((".jsonl", ".json", ".parquet", ".ndjson", "saved"))
    if form in (".parquet", "saved"):
        try:
            columns = dict.fromkeys(name for row in rows for name in row)
            table = pa.table({name: [row.get(name) for row in rows] for name in columns})
        except (pa.ArrowException, TypeError, OverflowError):
            form = ".jsonl"  # Rows of several types make no table.
        else:
            if form == ".parquet":
                pq.write_table(table, folder / f"{stem}.parquet")
                return f"{stem}.parquet"
            from datasets import Dataset

            Dataset(table).save_to_disk(str(folder / stem))
            for image in folder.glob("*.png"):
                (folder / stem / image.name).write_bytes(image.read_bytes())
            return stem
    ending = rng.choice(("\n", "\r\n"))
    text = json.dumps(rows, indent=rng.choice((None, 1))) if form == ".json" else ending.join(map(json.dumps, rows))
    (folder / f"{stem}{form}").write_bytes(rng.choice((b"", b"\xef\xbb\xbf")) + text.encode())
    return f"{stem}{form}"


def ids(folder: Path, rng: random.Random) -> WrittenCase:
    """Write rows whose ids are missing, repeated, floats or under another name; all are used."""
    (folder / "a.png").write_bytes(picture(rng))
    name = rng.choice(("id", "prompt_id", "question_id", "idx", "image_id"))
    make: Callable[[int], Any] = rng.choice(
        (
            float,
            lambda n: "same",
            lambda n: None,
            lambda n: n // 3,
            lambda n: f" {n} ",
            lambda n: float("nan"),
        )
    )
    rows = [{name: make(n), "image": "a.png", "text": f"Question {n}?"} for n in range(rng.randint(1, 12))]
    if rng.random() < 0.3:
        for row in rows:
            del row[name]
    return WrittenCase("prompts", write_rows(folder, "rows", rows, rng), len(rows), "accepted")


def texts(folder: Path, rng: random.Random) -> WrittenCase:
    """Write questions where other programs put them, beside empty fields that must not hide them."""
    (folder / "a.png").write_bytes(picture(rng))
    talk = rng.choice(("from", "role"))
    key, who = ("value", "human") if talk == "from" else ("content", "user")
    message = {talk: who, key: f"<image>\n{QUESTION}"}
    parts = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    options: tuple[dict[str, Any], ...] = (
        {"text": "", "question": QUESTION},
        {"text": None, "question": QUESTION},
        {"text": float("nan"), "question": QUESTION},
        {"text": "<image>", "instruction": QUESTION},
        {"instruction": QUESTION, "input": ""},
        {"instruction": "Look.", "input": QUESTION},
        {"conversations": [message, {talk: "gpt", key: "A boat."}]},
        {"messages": [{talk: "system", key: "Be brief."}, message]},
        {"messages": [parts]},
        {"prompt": [parts]},
        {"text": json.dumps({"question": QUESTION, "chosen": "A boat.", "rejected": "A fish."})},
        {"text": f"<ima<image>ge>{QUESTION}<video>"},
    )
    rows = [{"id": n, "image": "a.png", **rng.choice(options)} for n in range(rng.randint(1, 6))]
    return WrittenCase("prompts", write_rows(folder, "rows", rows, rng), len(rows), "accepted")


def image_fields(folder: Path, rng: random.Random) -> WrittenCase:
    """Write images under every name and in every form; only what is on the web is not read."""
    content = picture(rng, rng.choice(("PNG", "JPEG", "WEBP")))
    (folder / "img").mkdir()
    for name in ("a.png", "img/a b.png"):
        (folder / name).write_bytes(content)
    encoded = base64.b64encode(content).decode()
    path = rng.choice(("a.png", "./a.png", "img/a b.png", "img\\a b.png", (folder / "a.png").as_uri(), "img/a%20b.png"))
    options: tuple[dict[str, Any], ...] = (
        {"image": path},
        {"image_path": path},
        {"file_name": path},
        {"images": [path]},
        {"image": {"path": path}},
        {"image": {"bytes": None, "path": path}},
        {"images": [{"path": path}]},
        {"image": f"data:image/png;base64,{encoded}"},
        {"image": encoded},
        {"image": {"url": f"data:image/png;base64,{encoded}"}},
        {"image": f"DATA:image/png;charset=x;base64,{encoded[:40]}\n{encoded[40:]}"},
        {"image": encoded.rstrip("=").replace("+", "-").replace("/", "_")},
        {"images": json.dumps([path])},
        {"image": "", "image_path": path},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": path}, {"type": "text", "text": QUESTION}]}
            ]
        },
    )
    row = {"id": 1, "text": QUESTION, **rng.choice(options)}
    if rng.random() < 0.15:
        row = {
            "id": 1,
            "text": QUESTION,
            "image": rng.choice(("https://x.org/a.png", "s3://bucket/a.png", "data:image/png;base64,@")),
        }
        (folder / "rows.jsonl").write_text(json.dumps(row))
        return WrittenCase("prompts", "rows.jsonl", 1, "rejected")
    (folder / "rows.jsonl").write_text(json.dumps(row))
    return WrittenCase("prompts", "rows.jsonl", 1, "accepted")


def pairs_of_others(folder: Path, rng: random.Random) -> WrittenCase:
    """Write preference pairs as another program does."""
    (folder / "a.png").write_bytes(picture(rng))
    row = OTHERS[rng.choice(sorted(OTHERS))]
    rows = [row] * rng.randint(1, 5)
    return WrittenCase("pairs", write_rows(folder, "pairs", rows, rng), len(rows), "accepted")


def pairs_without_a_key(folder: Path, rng: random.Random) -> WrittenCase:
    """Write pairs of another program with one field missing, renamed or of another type."""
    (folder / "a.png").write_bytes(picture(rng))
    row = dict(OTHERS[rng.choice(sorted(OTHERS))])
    key = rng.choice(sorted(row))
    value = row.pop(key)
    if rng.random() < 0.5:
        row[rng.choice((key.upper(), f"{key}_0"))] = value
    elif rng.random() < 0.5:
        row[key] = rng.choice((None, "", 7, [], {}, [[]], "x", {"a": "b"}))
    (folder / "pairs.jsonl").write_text(json.dumps(row))
    return WrittenCase("pairs", "pairs.jsonl", 1)


def links(folder: Path, rng: random.Random) -> WrittenCase:
    """Link pictures, folders and chains of links from outside the image root."""
    outside = folder.parent / f"shared-{folder.name}"
    outside.mkdir(exist_ok=True)
    (outside / "a.png").write_bytes(picture(rng))
    kind, follow = rng.choice(("file", "folder", "chain", "parent")), rng.random() < 0.6
    name = "a.png" if kind == "file" else "coco/a.png"
    if kind == "file":
        (folder / "a.png").symlink_to(outside / "a.png")
    elif kind == "chain":
        (folder / "first").symlink_to(outside)
        (folder / "coco").symlink_to("first")
    elif kind == "folder":
        (folder / "coco").symlink_to(outside)
    else:
        name = f"../{outside.name}/a.png"
    (folder / "rows.jsonl").write_text(json.dumps({"id": 1, "image": name, "text": QUESTION}))
    expected = "accepted" if follow and kind != "parent" else "rejected"
    return WrittenCase("prompts", "rows.jsonl", 1, expected, {"follow_links": follow})


def mixed_folder(folder: Path, rng: random.Random) -> WrittenCase:
    """Write a folder of pictures beside files that are not read; each of these is counted."""
    good = [f"{n}{rng.choice(('.jpg', '.JPG', '.jfif', '.png', '.webp', '.heic'))}" for n in range(rng.randint(1, 4))]
    for name in good:
        (folder / name).write_bytes(picture(rng, rng.choice(("JPEG", "PNG"))))
    counted = rng.sample(("x.jp2", "x.svg", "x.mp4", "x.nef", "prompts.jsonl", "list.csv", "x.psd"), rng.randint(0, 4))
    ignored = rng.sample((".hidden.jpg", "readme.txt", "notes.md", "Thumbs.db"), rng.randint(0, 3))
    for name in (*counted, *ignored):
        (folder / name).write_bytes(b"{}")
    return WrittenCase("prompts", ".", len(good) + len(counted), None if counted else "accepted")


def png_with(chunk: bytes, body: bytes, rng: random.Random) -> bytes:
    png = picture(rng)
    added = struct.pack(">I", len(body)) + chunk + body + struct.pack(">I", zlib.crc32(chunk + body))
    return png[:33] + added + png[33:]


def webp_with_odd_metadata(rng: random.Random) -> bytes:
    """Return a WebP whose metadata has no meaning, one part of it perhaps with another length."""
    content = picture(rng, "WEBP", exif=b"Exif\0\0" + rng.randbytes(30), xmp=rng.randbytes(9), icc_profile=b"icc!")
    start = content.index(rng.choice((b"EXIF", b"XMP ", b"ICCP"))) + 4
    length = rng.choice((content[start : start + 4], b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\3\0\0\0"))
    return content[:start] + length + content[start + 4 :]


def metadata(folder: Path, rng: random.Random) -> WrittenCase:
    """Write pictures with damaged or huge metadata; their pixels are whole."""
    size = rng.choice((100, 1_100_000, 4_000_000))
    zipped = zlib.compress(b"x" * size)
    kind = rng.randrange(9)
    if kind == 0:
        content = png_with(b"iCCP", b"p\0\0" + zipped, rng)
    elif kind == 1:
        content = png_with(b"zTXt", b"key\0\0" + zipped, rng)
    elif kind == 2:
        content = png_with(b"iTXt", b"key\0\1\0\0\0" + zipped, rng)
    elif kind == 3:
        content = png_with(b"eXIf", rng.randbytes(60), rng)
    elif kind == 4:
        content = webp_with_odd_metadata(rng)
    elif kind == 5:
        content = picture(rng, "GIF")
        start = 13 + (3 << ((content[10] & 7) + 1))
        block = rng.randbytes(rng.randint(1, 200))
        content = content[:start] + b"!" + rng.randbytes(1) + bytes([len(block)]) + block + b"\0" + content[start:]
    elif kind == 6:
        content = picture(rng, "JPEG")
        body = rng.choice((b"JFIF\0", b"Adobe\0", b"MPF\0II*\0", b"ICC_PROFILE\0", b"")) + rng.randbytes(
            rng.randint(0, 9)
        )
        marker = bytes((0xFF, rng.choice((0xE1, 0xE2, 0xED, 0xFE))))
        content = content[:2] + marker + (2 + len(body)).to_bytes(2, "big") + body + content[2:]
    else:
        exif = Image.Exif()
        exif[0x0112] = rng.choice((1, 3, 6, 8))
        exif[0x9201] = 1.5  # a signed rational
        exif[0x010F] = "maker"
        block = bytearray(exif.tobytes())
        for _ in range(rng.randint(0, 8)):
            block[rng.randrange(14, len(block))] = rng.randrange(256)
        content = picture(rng, "JPEG", exif=bytes(block), icc_profile=rng.randbytes(200))
    (folder / "a.jpg").write_bytes(content)
    (folder / "rows.jsonl").write_text(json.dumps({"id": 1, "image": "a.jpg", "text": QUESTION}))
    return WrittenCase("prompts", "rows.jsonl", 1, "accepted")


def evaluation(folder: Path, rng: random.Random) -> WrittenCase:
    """Write a benchmark's prompts with the names and the marks that prompts may have."""
    (folder / "a.png").write_bytes(picture(rng))
    image = rng.choice(
        ({"image": "a.png"}, {"images": ["a.png"]}, {"file_name": "a.png"}, {"image": {"path": "a.png"}})
    )
    question = {"text": QUESTION, "label": rng.choice(("yes", "no"))}
    rows = [
        {rng.choice(("question_id", "id")): rng.choice((n, float(n), f"{n}")), **image, **question} for n in range(1, 4)
    ]
    mark = rng.choice((b"", b"\xef\xbb\xbf"))
    (folder / "rows.jsonl").write_bytes(mark + "\n".join(map(json.dumps, rows)).encode())
    return WrittenCase("evaluation_prompts", "rows.jsonl", len(rows), "accepted")


FAMILIES = (
    "llava_clip",
    "qwen2_vl",
    "qwen3_vl",
    "gemma3",
    "pixtral",
    "idefics3",
    "internvl",
    "llava_next",
    "paligemma",
)


def processor(folder: Path, rng: random.Random) -> WrittenCase:
    """Ask a family's processor about extreme sizes, its own placeholders and texts without end."""
    family = rng.choice(FAMILIES)
    long, short = rng.randint(1, 6000), rng.randint(1, 40)
    size = rng.choice(((long, short), (short, long), (short, short), (1, 1)))
    while size[0] * size[1] > MOST_PIXELS:
        size = (size[0] // 2, size[1] // 2)
    (folder / "odd.png").write_bytes(picture(rng, size=size))
    (folder / "good.png").write_bytes(picture(rng, size=(64, 48)))
    tokens = ("<image>", "<video>", "<|image_pad|>", "<|vision_start|>", "<start_of_image>", "[IMG]", "[IMG_END]")
    tokens = (*tokens, "<IMG_CONTEXT>", "<row_1_col_2>", "<fake_token_around_image>", "</s>", "\uff1cimage\uff1e")
    words = [rng.choice((*tokens, "What", "is", "it?", "\u200b", "🦊")) for _ in range(rng.choice((1, 4, 9, 5000)))]
    rows = [
        {"id": 1, "image": "odd.png", "text": QUESTION},
        {"id": 2, "image": "good.png", "text": rng.choice(("", " ")).join(words)},
        {"id": 3, "image": "good.png", "text": QUESTION},
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return WrittenCase("checked_prompts", "rows.jsonl", 3, settings={"family": family})


KINDS: dict[str, tuple[Maker, int]] = {
    "field ids": (ids, 5),
    "field texts": (texts, 6),
    "field image names": (image_fields, 8),
    "field pairs": (pairs_of_others, 8),
    "field pairs without a key": (pairs_without_a_key, 8),
    "field links": (links, 5),
    "field folder": (mixed_folder, 5),
    "field metadata": (metadata, 6),
    "field evaluation": (evaluation, 4),
    "field processor": (processor, 8),
}
