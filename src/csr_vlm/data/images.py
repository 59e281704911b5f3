"""Load images from untrusted files."""

from __future__ import annotations

import warnings
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import IO

from PIL import Image, ImageOps, UnidentifiedImageError

from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt
from csr_vlm.store.files import open_regular, sha256_of


class BadImage(ValueError):
    """Represent an unusable image; the message gives the reason in a few words."""


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are decoded. Pillow supports more, some of which start other programs."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
"""File suffixes of these formats, in lower case."""
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
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    # The message omits the size, since reasons are counted and must not differ between images.
                    raise BadImage(f"too large (over {max_pixels:,} pixels)")
                if image.mode in ("I", "F"):
                    raise BadImage("32-bit grayscale without a known white level")
                return _to_rgb(ImageOps.exif_transpose(image))
    except BadImage:
        raise
    except FileNotFoundError:
        raise BadImage("missing") from None
    except UnidentifiedImageError:
        raise BadImage("not an image") from None
    except Image.DecompressionBombError:
        raise BadImage("too large") from None
    except OSError as error:
        # Decoders put byte counts and paths into their messages, so only the system's reason is kept.
        raise BadImage(f"unreadable ({error.strerror or 'damaged'})") from None
    except Exception:
        # Decoders raise many other exceptions on damaged files.
        raise BadImage("unreadable (damaged)") from None


def load_prompt_image(prompt: Prompt, max_pixels: int) -> Image.Image:
    """Load the image of a prompt that passed the check of the inputs.

    Raises:
        CsrError: The image was deleted or changed since.
    """
    try:
        loaded = load_image(prompt.image, max_pixels)
    except BadImage as error:
        raise _unusable(prompt, str(error)) from None
    require_same_image(prompt)
    return loaded


def with_hash(prompt: Prompt) -> Prompt:
    """Return a prompt with the SHA-256 of its image, by which :func:`require_same_image` notices a change."""
    return replace(prompt, image_sha256=sha256_of(Path(prompt.image)))


def require_same_image(prompt: Prompt) -> None:
    """Verify that the image of a prompt is the one that was checked, as far as its hash was recorded.

    Raises:
        CsrError: The image was deleted or changed since.
    """
    path = Path(prompt.image)
    if not path.is_file():
        raise _unusable(prompt, "missing")
    if prompt.image_sha256 and sha256_of(path) != prompt.image_sha256:
        raise _unusable(prompt, "it was changed")


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
