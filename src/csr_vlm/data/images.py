"""Loading images from files that nobody has checked."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError


class BadImage(ValueError):
    """An image that cannot be used; the message says why in a few words."""


def load_image(path: str | Path, max_pixels: int) -> Image.Image:
    """Decode an image completely, upright and as RGB.

    Raises:
        BadImage: Missing, unreadable, truncated, or larger than ``max_pixels``, which is
            checked on the header, before anything is decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > max_pixels:
                    raise BadImage(f"too large ({image.width} x {image.height} pixels)")
                upright = ImageOps.exif_transpose(image)
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
    except (OSError, SyntaxError, ValueError) as error:
        raise BadImage(f"unreadable ({error})") from None
