"""Pictures that travel inside the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from csr_vlm.data.images import BadImage, load_image
from csr_vlm.evaluation.known_pictures import TruthOf, no_truth
from csr_vlm.report.limits import cut

_MOST_PIXELS = 336
_SCENE_SCALE = 3


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, or why there is none."""

    alt: str
    uri: str | None = None
    width: int = 0
    height: int = 0
    missing: str = ""


def picture(prompt_id: str, image: str | None, max_pixels: int, truth_of: TruthOf = no_truth) -> Picture:
    """Draw the known picture of this id, or else load and shrink the image file."""
    known = truth_of(prompt_id)
    if known is not None:
        return _embedded(known.draw(_SCENE_SCALE), "PNG", known.description)
    if image is None:
        return Picture(alt="", missing="no picture")
    try:
        loaded = load_image(image, max_pixels)
    except BadImage as error:
        return Picture(alt="", missing=f"picture {error}")
    except OSError:
        return Picture(alt="", missing="picture unreadable")
    loaded.thumbnail((_MOST_PIXELS, _MOST_PIXELS), Image.Resampling.LANCZOS)
    return _embedded(loaded, "JPEG", f"Image of prompt {cut(prompt_id, 200)}")


def _embedded(image: Image.Image, form: Literal["JPEG", "PNG"], alt: str) -> Picture:
    buffer = io.BytesIO()
    if form == "PNG":
        # Few colours: a palette looks the same and is a third of the size.
        image.quantize(64, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=80, optimize=True)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(alt, f"data:image/{form.lower()};base64,{encoded}", image.width, image.height)
