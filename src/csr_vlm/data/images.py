"""Loading images from files that nobody has checked."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path
from typing import IO

from PIL import Image, ImageOps, UnidentifiedImageError

from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt
from csr_vlm.store.files import open_regular


class BadImage(ValueError):
    """An image that cannot be used; the message says why in a few words."""


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is decoded; Pillow knows more, among them formats that start other programs."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
"""What files of these formats are called, in lower case."""


def load_image(source: str | Path | bytes, max_pixels: int) -> Image.Image:
    """Decode an image completely, upright and as RGB.

    Args:
        source: Path of a file, or what is in it.

    Raises:
        BadImage: Missing, unreadable, truncated, or larger than ``max_pixels``, which is
            checked on the header, before anything is decoded.
    """
    try:
        with warnings.catch_warnings(), _opened(source) as file:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    # Without the size, which would make every large image a reason of its own.
                    raise BadImage(f"too large (over {max_pixels:,} pixels)")
                if image.mode in ("I", "F"):
                    raise BadImage("32-bit grey levels, whose white is unknown")
                upright = ImageOps.exif_transpose(image)
                if upright.mode.startswith("I;16"):
                    # Left alone, everything above 255 of 65,535 would become white.
                    upright.info.pop("transparency", None)
                    upright = upright.point(lambda level: level * (1 / 256)).convert("L")
                if "A" in upright.getbands() or "transparency" in upright.info:
                    layer = upright.convert("RGBA")
                    upright = Image.new("RGBA", layer.size, "white")
                    upright.alpha_composite(layer)
                return upright.convert("RGB")
    except BadImage:
        raise
    except FileNotFoundError:
        raise BadImage("missing") from None
    except UnidentifiedImageError:
        raise BadImage("not an image") from None
    except Image.DecompressionBombError:
        raise BadImage("too large") from None
    except OSError as error:
        # Decoders put byte counts and paths into their messages; a reason must be countable.
        raise BadImage(f"unreadable ({error.strerror or 'damaged'})") from None
    except Exception:
        # Decoders of damaged files raise whatever they stumble over.
        raise BadImage("unreadable (damaged)") from None


def image_of(prompt: Prompt, max_pixels: int) -> Image.Image:
    """Load the image of a prompt that was checked before.

    Raises:
        CsrError: It has gone or changed since.
    """
    try:
        return load_image(prompt.image, max_pixels)
    except BadImage as error:
        raise CsrError(
            f"the image {prompt.image} of prompt {prompt.prompt_id} was usable when the inputs were checked and is "
            f"not now: {error}",
            "put it back and run the same command again",
        ) from None


def _opened(source: str | Path | bytes) -> IO[bytes]:
    return BytesIO(source) if isinstance(source, bytes) else open_regular(source)


def suffix_of(content: bytes) -> str:
    """Return the file suffix of an encoded image by its first bytes; empty where they are of no known format."""
    heads = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"BM": ".bmp"}
    heads |= {b"II*\x00": ".tif", b"MM\x00*": ".tif", b"P5": ".ppm", b"P6": ".ppm"}
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return ".webp"
    return next((suffix for head, suffix in heads.items() if content.startswith(head)), "")
