"""Load images from untrusted files.

Only pixels and orientation matter: metadata that is damaged or huge does not cost an image. Files that Pillow
refuses because of their metadata are read a second time without it (:mod:`csr_vlm.data.image_metadata`).
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import IO

from PIL import ExifTags, Image, UnidentifiedImageError

from csr_vlm.core.errors import CsrError
from csr_vlm.core.installing import is_installed
from csr_vlm.core.records import Prompt
from csr_vlm.data.image_metadata import without_metadata
from csr_vlm.store.files import open_regular, sha256_of


class BadImage(ValueError):
    """Represent an unusable image; the message gives the reason in a few words.

    Args:
        reason: Reason, which is counted.
        detail: What differs between files, such as their names.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Formats that are decoded. Pillow supports more, some of which start other programs."""
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm"),
    *(".avif", ".avifs", ".heic", ".heif", ".hif"),
)  # fmt: skip
"""File suffixes of these formats and of HEIF, in lower case."""
UNREAD_SUFFIXES = (
    *(".jp2", ".j2k", ".jxl", ".svg", ".psd", ".tga", ".ico", ".eps", ".exr", ".hdr", ".pcx", ".dds", ".raw"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pdf", ".mp4", ".mov", ".avi", ".webm", ".mkv"),
)  # fmt: skip
"""File suffixes of pictures and videos that are not read."""
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_SIGNATURES = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG": ".png",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"II*\x00": ".tif",
    b"MM\x00*": ".tif",
    b"P5": ".ppm",
    b"P6": ".ppm",
}


def load_image(source: str | Path | bytes, max_pixels: int) -> Image.Image:
    """Decode an image completely, apply its EXIF orientation, and convert it to RGB over white.

    Args:
        source: Path of a file, or the content of one.
        max_pixels: Largest width times height. It is checked in the header, before decoding.

    Raises:
        BadImage: The image is missing, unreadable, truncated, or larger than ``max_pixels``.
    """
    try:
        with warnings.catch_warnings(), _open(source) as file:
            warnings.simplefilter("ignore")
            return _decode(file, max_pixels)
    except BadImage:
        raise
    except FileNotFoundError:
        raise BadImage("missing", f"{source!s}"[:300]) from None
    except UnidentifiedImageError:
        raise BadImage(_kind_of_file(source)) from None
    except Image.DecompressionBombError:
        raise BadImage("too large") from None
    except OSError as error:
        # Decoders put byte counts and paths into their messages, so only the system's reason is kept.
        raise BadImage(f"unreadable ({error.strerror or 'damaged'})") from None
    except Exception:
        # Decoders raise many other exceptions on damaged files.
        raise BadImage("unreadable (damaged)") from None


def _kind_of_file(source: str | Path | bytes) -> str:
    """Say what a file that is not an image is: pointers come from copies of a repository without its pictures."""
    with _open(source) as file:
        is_pointer = file.read(23) == b"version https://git-lfs"
    return "a Git LFS pointer; fetch the images with git lfs pull" if is_pointer else "not an image"


def _decode(file: IO[bytes], max_pixels: int) -> Image.Image:
    """Decode an image; if that fails, decode what is left of the file without its metadata."""
    formats = (*FORMATS, "HEIF") if _has_heif_plugin() else FORMATS
    try:
        return _decode_once(file, formats, max_pixels)
    except (BadImage, Image.DecompressionBombError):
        raise
    except Exception as error:
        first_error = error
        file.seek(0)
        _refuse_heif(file)
        stripped = without_metadata(file)
        if stripped is None:
            raise
    try:
        image = _decode_once(BytesIO(stripped.content), formats, max_pixels)
    except UnidentifiedImageError:
        raise first_error from None
    return image if stripped.exif is None else _upright(image, _orientation_of_block(stripped.exif))


def _decode_once(file: IO[bytes], formats: tuple[str, ...], max_pixels: int) -> Image.Image:
    with Image.open(file, formats=formats) as image:
        if image.width * image.height > max_pixels:
            # The message omits the size, since reasons are counted and must not differ between images.
            raise BadImage(f"too large (over {max_pixels:,} pixels)")
        if image.mode in ("I", "F"):
            raise BadImage("32-bit grayscale without a known white level")
        image.load()
        return _upright(_to_rgb(image), _orientation(image))


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation alone, 1 to 8; 1 if it cannot be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Any other field of the block may be damaged in any way.
        return 1
    return value if isinstance(value, int) else 1


def _orientation_of_block(exif: bytes) -> int:
    """Return the orientation in an EXIF block; 1 if it cannot be read."""
    block = Image.Exif()
    try:
        block.load(exif)
        value = block.get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) else 1


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that turns an image of each EXIF orientation upright; 1 is upright."""


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    method = _UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


@cache
def _has_heif_plugin() -> bool:
    """Register Pillow's HEIF plugin if it is installed."""
    if not is_installed("pillow_heif"):
        return False
    import pillow_heif

    pillow_heif.register_heif_opener()
    return True


def _refuse_heif(file: IO[bytes]) -> None:
    """Raise BadImage for an HEIF file where no plugin can read it."""
    head = file.read(12)
    file.seek(0)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS and not _has_heif_plugin():
        raise BadImage("HEIC, which needs: pip install pillow-heif")


def load_prompt_image(prompt: Prompt, max_pixels: int) -> Image.Image:
    """Load the image of a prompt that passed the check of the inputs.

    Raises:
        CsrError: The image was deleted or changed since.
    """
    try:
        return load_unchanged_image(prompt, max_pixels)
    except BadImage as error:
        raise _unusable(prompt, str(error)) from None


def load_unchanged_image(prompt: Prompt, max_pixels: int) -> Image.Image:
    """Load the image of a prompt that passed the check of the inputs, for a page that can do without it.

    Raises:
        BadImage: The image was deleted or changed since.
    """
    loaded = load_image(prompt.image, max_pixels)
    _require_recorded_hash(prompt)
    return loaded


def png_as_seen(path: str, max_pixels: int) -> bytes | None:
    """Return the image as a policy sees it, as PNG; None if other programs read the same pixels from the file.

    They may not if the file has an EXIF orientation, transparency, 16 bits a channel, damaged metadata or is HEIF.

    Args:
        path: File of an image that passed the check of the inputs.
        max_pixels: As in :func:`load_image`.

    Raises:
        BadImage: The image was deleted or changed since.
    """
    if _is_plain(path):
        return None
    buffer = BytesIO()
    load_image(path, max_pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _is_plain(path: str) -> bool:
    """Return whether decoding a file and converting it to RGB is all that :func:`load_image` does."""
    try:
        with warnings.catch_warnings(), _open(path) as file, Image.open(file, formats=FORMATS) as image:
            warnings.simplefilter("ignore")
            if image.format != "JPEG":  # in other formats, metadata may follow the pixels
                image.load()
            is_opaque = "A" not in image.getbands() and "transparency" not in image.info
            return is_opaque and not image.mode.startswith("I") and _orientation(image) in (0, 1)
    except Exception:  # load_image, which reads more, says what is wrong
        return False


def with_hash(prompt: Prompt) -> Prompt:
    """Return a prompt with the SHA-256 of its image, by which :func:`require_same_image` notices a change."""
    return replace(prompt, image_sha256=sha256_of(Path(prompt.image)))


def require_same_image(prompt: Prompt) -> None:
    """Verify that the image of a prompt is the one that was checked, as far as its hash was recorded.

    Raises:
        CsrError: The image was deleted or changed since.
    """
    try:
        if not Path(prompt.image).is_file():
            raise BadImage("missing")
        _require_recorded_hash(prompt)
    except BadImage as error:
        raise _unusable(prompt, str(error)) from None


def _require_recorded_hash(prompt: Prompt) -> None:
    if prompt.image_sha256 and sha256_of(Path(prompt.image)) != prompt.image_sha256:
        raise BadImage("changed")


def _unusable(prompt: Prompt, reason: str) -> CsrError:
    return CsrError(
        f"the image {prompt.image} of prompt {prompt.prompt_id} was usable when the inputs were checked but is "
        f"not now: {reason}",
        "restore the file and run the same command again",
    )


def suffix_of(content: bytes) -> str:
    """Return the file suffix of an encoded image by its first bytes; empty if the format is unknown."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return ".webp"
    return next((suffix for signature, suffix in _SIGNATURES.items() if content.startswith(signature)), "")


def _open(source: str | Path | bytes) -> IO[bytes]:
    return BytesIO(source) if isinstance(source, bytes) else open_regular(source)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB; transparent pixels become white."""
    if image.mode.startswith("I;16"):
        # A plain conversion would turn everything above 255 of 65,535 into white.
        image.info.pop("transparency", None)
        image = image.point(lambda level: level * (1 / 256)).convert("L")
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    return image.convert("RGB")
