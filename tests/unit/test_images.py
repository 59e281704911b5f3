"""Load images from untrusted files."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from csr_vlm.data import images
from csr_vlm.data.images import BadImage, load_image

PLENTY = 10**6


def noise(side: int = 24) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def png_header(width: int, height: int) -> bytes:
    """Return a PNG file whose header declares pixels that the file does not have."""

    def chunk(body: bytes) -> bytes:
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR" + header) + chunk(b"IDAT" + zlib.compress(b""))


def test_a_good_image_is_decoded_exactly(tmp_path):
    image = noise()
    loaded = load_image(saved(image, tmp_path / "a.png"), PLENTY)
    assert loaded.mode == "RGB"
    assert loaded.tobytes() == image.tobytes()


def test_a_missing_file_is_rejected(tmp_path):
    with pytest.raises(BadImage, match=r"^missing$"):
        load_image(tmp_path / "nowhere.png", PLENTY)


def test_a_text_file_is_rejected(tmp_path):
    (tmp_path / "a.png").write_text("I am no image.")
    with pytest.raises(BadImage, match=r"^not an image$"):
        load_image(tmp_path / "a.png", PLENTY)


def test_an_empty_file_is_rejected(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(BadImage):
        load_image(tmp_path / "a.png", PLENTY)


def test_a_folder_is_rejected(tmp_path):
    with pytest.raises(BadImage, match="directory"):
        load_image(tmp_path, PLENTY)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF"])
def test_a_truncated_file_is_rejected(tmp_path, form):
    path = saved(noise(64), tmp_path / "image", format=form)
    load_image(path, PLENTY)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadImage):
        load_image(path, PLENTY)


def test_reasons_do_not_differ_between_files(tmp_path):
    """Two files with different names and damage are dropped for the same reason."""
    reasons = set()
    for keep in (0.5, 0.7):
        path = saved(noise(64), tmp_path / f"{keep}.jpg")
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
        with pytest.raises(BadImage) as caught:
            load_image(path, PLENTY)
        reasons.add(str(caught.value))
    assert len(reasons) == 1
    assert str(tmp_path) not in reasons.pop()


def test_the_pixel_limit_is_exact(tmp_path):
    path = saved(Image.new("RGB", (30, 20)), tmp_path / "a.png")
    assert load_image(path, 600).size == (30, 20)
    with pytest.raises(BadImage, match=r"^too large \(over 599 pixels\)$"):
        load_image(path, 599)


@pytest.mark.parametrize(("side", "limit"), [(1001, PLENTY), (60000, PLENTY), (60000, 10**10)])
def test_a_decompression_bomb_is_rejected_before_decoding(tmp_path, side, limit):
    # The file has no pixel data, so decoding it would report damage.
    (tmp_path / "bomb.png").write_bytes(png_header(side, side))
    with pytest.raises(BadImage, match="too large"):
        load_image(tmp_path / "bomb.png", limit)


def test_the_same_file_within_the_limit_is_damaged(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_header(900, 900))
    with pytest.raises(BadImage, match="damaged"):
        load_image(tmp_path / "bomb.png", PLENTY)


def test_transparent_pixels_become_white(tmp_path):
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 128))
    loaded = load_image(saved(image, tmp_path / "a.png"), PLENTY)
    assert loaded.mode == "RGB"
    assert loaded.getpixel((0, 0)) == (255, 255, 255)
    assert loaded.getpixel((1, 0)) == (255, 0, 0)
    assert loaded.getpixel((2, 0)) == (127, 127, 127)
    assert image.convert("RGB").getpixel((0, 0)) == (0, 0, 0), "a plain conversion ignores transparency"


def test_a_transparent_palette_entry_becomes_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    for name, options in (("a.png", {"transparency": 0}), ("a.gif", {"transparency": 0})):
        loaded = load_image(saved(image, tmp_path / name, **options), PLENTY)
        assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)], name
    opaque = load_image(saved(image, tmp_path / "b.png"), PLENTY)
    assert opaque.getpixel((0, 0)) == (0, 0, 0)


def test_a_transparent_color_becomes_white(tmp_path):
    image = Image.new("RGB", (2, 1), (10, 20, 30))
    image.putpixel((1, 0), (9, 9, 9))
    loaded = load_image(saved(image, tmp_path / "a.png", transparency=(10, 20, 30)), PLENTY)
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (9, 9, 9)]


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (3, 1)), (6, (1, 0)), (8, (0, 3))])
def test_exif_orientation_is_applied(tmp_path, orientation, corner):
    image = Image.new("RGB", (4, 2), "white")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = load_image(saved(image, tmp_path / "a.png", exif=exif), PLENTY)
    assert loaded.size == ((2, 4) if orientation in {6, 8} else (4, 2))
    assert loaded.getpixel(corner) == (255, 0, 0)


def test_grayscale_is_converted(tmp_path):
    loaded = load_image(saved(Image.new("L", (1, 1), 77), tmp_path / "a.png"), PLENTY)
    assert loaded.getpixel((0, 0)) == (77, 77, 77)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grayscale_keeps_its_range(tmp_path, suffix):
    levels = np.array([[0, 255, 256, 0x8000, 0xFFFF]], dtype=np.uint16)
    loaded = load_image(saved(Image.fromarray(levels), tmp_path / f"a.{suffix}"), PLENTY)
    assert loaded.mode == "RGB"
    assert [loaded.getpixel((x, 0))[0] for x in range(5)] == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_32_bit_grayscale_is_rejected(tmp_path, kind):
    path = saved(Image.fromarray(np.zeros((2, 2), dtype=kind)), tmp_path / "a.tif")
    with pytest.raises(BadImage, match="32-bit"):
        load_image(path, PLENTY)


def test_cmyk_and_black_and_white_are_converted(tmp_path):
    assert load_image(saved(Image.new("CMYK", (8, 8)), tmp_path / "a.jpg"), PLENTY).getpixel((4, 4)) == (255,) * 3
    assert load_image(saved(Image.new("1", (2, 2), 1), tmp_path / "a.png"), PLENTY).getpixel((0, 0)) == (255,) * 3


@pytest.mark.parametrize("exception", [struct.error, KeyError, RuntimeError, NotImplementedError, EOFError, zlib.error])
def test_any_exception_of_a_decoder_is_a_bad_image(tmp_path, monkeypatch, exception):
    path = saved(noise(), tmp_path / "a.png")

    def fail(image: Image.Image) -> None:
        raise exception("inside the decoder")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(BadImage, match="damaged"):
        load_image(path, PLENTY)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_damaged_bytes_give_an_image_or_a_reason(tmp_path, form):
    rng, buffer, path = random.Random(form), io.BytesIO(), tmp_path / "image"
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "A description."
    noise().save(buffer, form, exif=exif)
    results = {"image": 0, "reason": 0}
    for _ in range(60):
        damaged = bytearray(buffer.getvalue())
        for _ in range(rng.randint(1, 5)):
            damaged[rng.randrange(min(len(damaged), 300))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.randint(1, len(damaged))] if rng.random() < 0.2 else damaged)
        try:
            loaded = load_image(path, PLENTY)
        except BadImage:
            results["reason"] += 1
        else:
            assert loaded.mode == "RGB"
            results["image"] += 1
    assert results["reason"]


# Metadata never costs pixels


def exif_block(orientation: int, extra: bytes) -> bytes:
    """Return an EXIF block with an orientation and one more directory entry of twelve bytes, whose value may follow."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, orientation) + extra[:12]
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0) + extra[12:]


SIGNED_RATIONAL = struct.pack("<HHII", 0x011A, 10, 1, 38) + struct.pack("<ii", -72, 0)
TEXT_FOR_A_NUMBER = struct.pack("<HHI4s", 0x0100, 2, 4, b"wide")
ENDLESS_COUNT = struct.pack("<HHII", 0x011A, 5, 2**31, 2**31)


@pytest.mark.parametrize("extra", [SIGNED_RATIONAL, TEXT_FOR_A_NUMBER, ENDLESS_COUNT])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_exif_field_costs_neither_pixels_nor_orientation(tmp_path, form, extra):
    image = noise(16).crop((0, 0, 16, 8))
    options = {"lossless": True} if form == "WEBP" else {}
    path = saved(image, tmp_path / "a", format=form, exif=exif_block(6, extra), **options)
    plain = load_image(saved(image, tmp_path / "b", format=form, **options), PLENTY)
    assert load_image(path, PLENTY).tobytes() == plain.transpose(Image.Transpose.ROTATE_270).tobytes()


def with_chunk(png: bytes, name: bytes, body: bytes, checksum: int | None = None) -> bytes:
    """Return a PNG file with a chunk after its header."""
    checksum = zlib.crc32(name + body) if checksum is None else checksum
    return png[:33] + struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum) + png[33:]


BIG = zlib.compress(b"x" * (2 << 20))


@pytest.mark.parametrize(
    "chunk",
    [
        (b"iCCP", b"profile\0\0" + BIG),
        (b"zTXt", b"Comment\0\0" + BIG),
        (b"iTXt", b"Comment\0\1\0\0\0" + BIG),
        (b"iCCP", b"profile\0\0garbage"),
        (b"iCCP", b""),
        (b"pHYs", b"\0"),
        (b"tEXt", b"Comment\0x", 7),
    ],
    ids=["iCCP", "zTXt", "iTXt", "broken iCCP", "empty iCCP", "short pHYs", "wrong checksum"],
)
def test_metadata_of_a_png_costs_neither_pixels_nor_orientation(tmp_path, chunk):
    image = noise(16).crop((0, 0, 16, 8))
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 3
    image.save(buffer, "PNG", exif=exif)
    (tmp_path / "a.png").write_bytes(with_chunk(buffer.getvalue(), *chunk))
    assert load_image(tmp_path / "a.png", PLENTY).tobytes() == image.transpose(Image.Transpose.ROTATE_180).tobytes()


@pytest.mark.parametrize("name", [b"ICCP", b"EXIF", b"XMP "])
@pytest.mark.parametrize("length", [0, 3, 2**31 - 1])
def test_a_wrong_length_of_metadata_in_a_webp_costs_no_pixels(tmp_path, name, length):
    image = noise(16).crop((0, 0, 16, 8))
    content = saved(
        image, tmp_path / "a", format="WEBP", lossless=True, exif=exif_block(6, b""), xmp=b"<x/>", icc_profile=b"icc!"
    ).read_bytes()
    start = content.index(name) + 4
    damaged = content[:start] + length.to_bytes(4, "little") + content[start + 4 :]
    loaded = load_image(damaged, PLENTY)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    assert loaded.tobytes() in (upright.tobytes(), image.tobytes())
    assert name == b"EXIF" or loaded.tobytes() == upright.tobytes()


def test_a_truncated_webp_is_still_rejected_after_the_second_reading(tmp_path):
    for options in ({"lossless": True}, {"exif": exif_block(6, b"")}):
        content = saved(noise(), tmp_path / "a", format="WEBP", **options).read_bytes()
        pixels = content.index(b"VP8", 16 if options.get("exif") else 12)
        end = pixels + 8 + int.from_bytes(content[pixels + 4 : pixels + 8], "little")
        for length in range(40, end, 7):
            with pytest.raises(BadImage):
                load_image(content[:length], PLENTY)


@pytest.mark.parametrize(
    "extension", [b"!\xf9\x01\x04\0", b"!\xfe\x03abc\0", b"!\xff\x02ab\0", b"!\xff\x0bNETSCAPE2.0\x01\x01\0"]
)
def test_extensions_of_a_gif_cost_no_pixels(tmp_path, extension):
    content = saved(noise().convert("P"), tmp_path / "a", format="GIF").read_bytes()
    start = 13 + (3 << ((content[10] & 7) + 1))
    assert (
        load_image(content[:start] + extension + content[start:], PLENTY).tobytes()
        == load_image(content, PLENTY).tobytes()
    )


def test_segments_and_chunks_that_decoders_ignore_cost_no_pixels(tmp_path):
    jpeg = saved(noise(), tmp_path / "a", format="JPEG").read_bytes()
    png = saved(noise(), tmp_path / "b", format="PNG").read_bytes()
    for good, damaged in (
        (jpeg, jpeg[:2] + b"\xff\xe0\0\x07JFIF\0" + jpeg[2:]),
        (jpeg, jpeg[:2] + b"\xff\xee\0\x08Adobe\0" + jpeg[2:]),
        (jpeg, jpeg[:2] + b"\xff\xe2\0\x0eMPF\0II*\0\xff\xff\xff\xff" + jpeg[2:]),
        (png, with_chunk(png, b"tRNS", b"\0")),
    ):
        assert load_image(damaged, PLENTY).tobytes() == load_image(good, PLENTY).tobytes()


def test_damaged_pixels_are_still_rejected_after_the_second_reading(tmp_path):
    buffer = io.BytesIO()
    noise(64).save(buffer, "PNG")
    content = with_chunk(buffer.getvalue(), b"zTXt", b"Comment\0\0" + BIG)
    (tmp_path / "a.png").write_bytes(content[: len(content) - len(buffer.getvalue()) // 2])
    with pytest.raises(BadImage, match="damaged"):
        load_image(tmp_path / "a.png", PLENTY)


def test_avif_is_read_and_heic_names_its_plugin(tmp_path, monkeypatch):
    saved(noise(), tmp_path / "a.avif", format="AVIF")
    assert load_image(tmp_path / "a.avif", PLENTY).size == (24, 24)
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 99)
    monkeypatch.setattr(images, "_has_heif_plugin", lambda: False)
    with pytest.raises(BadImage, match="HEIC, which needs: pip install pillow-heif"):
        load_image(tmp_path / "a.heic", PLENTY)
