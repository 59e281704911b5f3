"""Limit the tokens of a picture (``model.max_image_tokens``), where a model's family has more for larger pictures.

The limit is set on the processor when it is loaded, so generation, scoring and training see the same pictures. Families
cut or scale pictures in five ways:

=============  ==================================================  =======================================
families       how a picture becomes tokens                        what is limited
=============  ==================================================  =======================================
Qwen-VL        one token per square of patches                     the number of pixels
Pixtral,       one token per square of patches                     the longest side
Mistral 3
InternVL       tiles of equal size, and a thumbnail                the number of tiles
Idefics 3,     tiles of equal size, and a thumbnail, from a        that longest side
SmolVLM        picture scaled to a longest side
LLaVA-NeXT,    tiles by the best of a list of grids, and a         the list of grids
OneVision      thumbnail
=============  ==================================================  =======================================
"""

from __future__ import annotations

import math
from copy import copy
from typing import Any

from csr_vlm.core.errors import CsrError


def limit_image_tokens(processor: Any, config: Any, limit: int | None) -> None:
    """Make a processor scale pictures down to at most so many image tokens.

    Args:
        processor: Processor of the model; changed in place.
        config: Configuration of the model, whose grids are changed with those of the processor.
        limit: Most tokens that carry features of one picture; None changes nothing.

    Raises:
        CsrError: All pictures of this family have the same number of tokens, or the limit is below the fewest.
    """
    if limit is None:
        return
    pictures = processor.image_processor
    if hasattr(pictures, "merge_size"):
        _limit_pixels(pictures, limit)
    elif hasattr(pictures, "max_patches"):
        _limit_tiles(pictures, limit, processor.image_seq_length)
    elif hasattr(pictures, "image_grid_pinpoints"):
        _limit_grids(pictures, config, limit)
    elif hasattr(pictures, "max_image_size"):
        _limit_scaled_side(pictures, limit, processor.image_seq_len)
    elif type(processor).__name__ == "PixtralProcessor":
        _limit_side(pictures, limit, processor.patch_size * processor.spatial_merge_size)
    else:
        raise CsrError(
            f"model.max_image_tokens has no effect: all pictures of model type {config.model_type!r} have the same "
            "number of tokens",
            "remove it",
        )


def image_limit_options(processor: Any) -> dict[str, Any]:
    """Return the options of a limited processor by which another program limits pictures alike.

    They are arguments of the image processor of transformers; empty if the limit is not one of its arguments.

    Example:
        >>> from types import SimpleNamespace
        >>> image_limit_options(SimpleNamespace(image_processor=SimpleNamespace(max_patches=3)))
        {'max_patches': 3}
    """
    pictures = processor.image_processor
    if hasattr(pictures, "max_patches"):
        return {"max_patches": pictures.max_patches}
    if hasattr(pictures, "image_grid_pinpoints"):
        return {}
    size = pictures.size
    edges = {edge: size[edge] for edge in ("shortest_edge", "longest_edge") if size[edge] is not None}
    return {"size": edges}


def _limit_pixels(pictures: Any, limit: int) -> None:
    per_token = (pictures.patch_size * pictures.merge_size) ** 2
    pixels = min(limit * per_token, pictures.size["longest_edge"])
    _set_size(pictures, longest_edge=pixels, shortest_edge=min(pictures.size["shortest_edge"], pixels))


def _limit_side(pictures: Any, limit: int, per_token: int) -> None:
    side = math.isqrt(limit) * per_token
    _set_size(pictures, longest_edge=min(side, pictures.size["longest_edge"]))


def _limit_tiles(pictures: Any, limit: int, per_tile: int) -> None:
    """Limit the tiles: two or more come with a thumbnail, one alone without."""
    tiles = limit // per_tile
    _require(tiles >= 1, limit, per_tile)
    pictures.max_patches = min(max(tiles - 1, 1), pictures.max_patches)
    pictures.min_patches = min(pictures.min_patches, pictures.max_patches)


def _limit_scaled_side(pictures: Any, limit: int, per_tile: int) -> None:
    """Limit the longest side to k tiles: at most k x k of them and a thumbnail; one alone has none."""
    tiles = limit // per_tile
    _require(tiles >= 1, limit, per_tile)
    tile = pictures.max_image_size["longest_edge"]
    side = tile * max(math.isqrt(tiles - 1), 1)
    _set_size(pictures, longest_edge=min(side, pictures.size["longest_edge"]))


def _limit_grids(pictures: Any, config: Any, limit: int) -> None:
    vision = config.vision_config
    tokens = {tuple(grid): _tokens_of_grid(grid, vision) for grid in pictures.image_grid_pinpoints}
    _require(min(tokens.values()) <= limit, limit, min(tokens.values()))
    allowed = [list(grid) for grid, number in tokens.items() if number <= limit]
    pictures.image_grid_pinpoints = allowed
    config.image_grid_pinpoints = allowed


def _tokens_of_grid(grid: list[int], vision: Any) -> int:
    """Return the most tokens of a picture on a grid: a thumbnail, the tiles' patches, and an end of each line."""
    lines, columns = grid[0] // vision.patch_size, grid[1] // vision.patch_size
    thumbnail = (vision.image_size // vision.patch_size) ** 2
    return int(thumbnail + lines * columns + lines)


def _set_size(pictures: Any, **edges: int) -> None:
    size = copy(pictures.size)
    for edge, value in edges.items():
        size[edge] = value
    pictures.size = size


def _require(is_possible: bool, limit: int, fewest: int) -> None:
    if not is_possible:
        raise CsrError(
            f"model.max_image_tokens={limit} is less than the fewest tokens of a picture",
            f"set it to {fewest} or more",
        )
