"""Embed pictures in a page as data URIs."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from csr_vlm.core.records import Prompt
from csr_vlm.data.images import BadImage, load_unchanged_image
from csr_vlm.evaluation.known_pictures import TruthOf, no_truth
from csr_vlm.report.limits import shorten

_MAX_SIDE = 336
"""Largest width and height in pixels."""
_SCENE_SCALE = 3
_NUM_PALETTE_COLORS = 64


@dataclass(frozen=True)
class Picture:
    """Hold an image as a data URI, or the reason why there is none."""

    alt: str
    uri: str | None = None
    width: int = 0
    height: int = 0
    missing: str = ""


def embed_picture(prompt_id: str, prompt: Prompt | None, max_pixels: int, truth_of: TruthOf = no_truth) -> Picture:
    """Draw the known picture of a prompt, or load and shrink its image file."""
    known = truth_of(prompt_id)
    if known is not None:
        return _encoded(known.draw(_SCENE_SCALE), "PNG", known.description)
    if prompt is None:
        return Picture(alt="", missing="no image")
    try:
        loaded = load_unchanged_image(prompt, max_pixels)
    except BadImage as error:
        return Picture(alt="", missing=f"image {error}")
    except OSError:
        return Picture(alt="", missing="image unreadable")
    loaded.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)
    return _encoded(loaded, "JPEG", f"Image of prompt {shorten(prompt_id, 200)}")


def _encoded(image: Image.Image, image_format: Literal["JPEG", "PNG"], alt: str) -> Picture:
    buffer = io.BytesIO()
    if image_format == "PNG":
        # Drawn scenes have few colors: a palette looks the same at a third of the size.
        image.quantize(_NUM_PALETTE_COLORS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=80, optimize=True)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(alt, f"data:image/{image_format.lower()};base64,{encoded}", image.width, image.height)
