"""A radar chart as inline SVG: several models over several benchmarks, each on its own scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from csr_vlm.core.formatting import fixed

WIDTH, HEIGHT, _RADIUS = 560, 430, 150
_INNER = 0.2
"""Where the worst value of a spoke lies, as a share of the radius; the best lies at the rim."""
_RINGS = 4


@dataclass(frozen=True)
class Spoke:
    """One benchmark."""

    name: str
    lower_is_better: bool = False
    others: Sequence[float] = ()
    """Values that widen its scale without being drawn, so that small gaps look small."""


@dataclass(frozen=True)
class Shape:
    """One model's values, spoke by spoke; None where it has none."""

    name: str
    values: Sequence[float | None]
    style: int = 0


def radar(description: str, spokes: Sequence[Spoke], shapes: Sequence[Shape]) -> Markup:
    """Draw the models as polygons; an empty string with fewer than three spokes.

    Each spoke runs from the worst value shown on it (near the middle) to the best (at the rim),
    so a shape tells ranks and gaps on a spoke, and nothing from one spoke to the next.
    """
    if len(spokes) < 3:
        return Markup("")
    scales = [_scale([shape.values[at] for shape in shapes], spoke) for at, spoke in enumerate(spokes)]
    parts = [_grid(len(spokes))]
    parts += [
        _label(at, len(spokes), spoke, scale) for at, (spoke, scale) in enumerate(zip(spokes, scales, strict=True))
    ]
    parts += [_polygon(shape, scales) for shape in shapes]
    return Markup('<svg class="chart radar" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, description, Markup("").join(parts)
    )


Scale = tuple[float, float] | None
"""(worst, best) of a spoke; None where no model has a value."""


def _scale(values: Sequence[float | None], spoke: Spoke) -> Scale:
    known = [value for value in values if value is not None]
    if not known:
        return None
    ends = (min([*known, *spoke.others]), max([*known, *spoke.others]))
    return ends[::-1] if spoke.lower_is_better else ends


def share(value: float, scale: tuple[float, float]) -> float:
    """Place a value between the worst (``_INNER``) and the best (1) of its spoke."""
    worst, best = scale
    return 1.0 if worst == best else _INNER + (1 - _INNER) * (value - worst) / (best - worst)


def _at(index: int, number: int, radius: float) -> tuple[float, float]:
    angle = 2 * math.pi * index / number - math.pi / 2
    return WIDTH / 2 + radius * math.cos(angle), HEIGHT / 2 + radius * math.sin(angle)


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _grid(number: int) -> Markup:
    rings = [
        Markup('<polygon class="ring" points="{}"/>').format(
            _points([_at(index, number, _RADIUS * ring / _RINGS) for index in range(number)])
        )
        for ring in range(1, _RINGS + 1)
    ]
    spokes = [
        Markup('<line class="grid" x1="{}" y1="{}" x2="{:.1f}" y2="{:.1f}"/>').format(
            WIDTH // 2, HEIGHT // 2, *_at(index, number, _RADIUS)
        )
        for index in range(number)
    ]
    return Markup("").join(rings + spokes)


def _label(index: int, number: int, spoke: Spoke, scale: Scale) -> Markup:
    x, y = _at(index, number, _RADIUS + 16)
    y -= 8 * (y < HEIGHT / 2 - _RADIUS)  # two lines of text stand above the topmost spoke
    anchor = "middle" if abs(x - WIDTH / 2) < 20 else "start" if x > WIDTH / 2 else "end"
    extent = "" if scale is None else f"{fixed(scale[0], 1)} → {fixed(scale[1], 1)}"
    return Markup(
        '<text class="spoke" text-anchor="{}" x="{:.1f}" y="{:.1f}">{}'
        '<tspan class="extent" x="{:.1f}" dy="13">{}</tspan></text>'
    ).format(anchor, x, y, spoke.name, x, extent)


def _polygon(shape: Shape, scales: Sequence[Scale]) -> Markup:
    number = len(scales)
    places = [
        _at(index, number, _RADIUS * share(value, scale))
        for index, (value, scale) in enumerate(zip(shape.values, scales, strict=True))
        if value is not None and scale is not None
    ]
    dots = Markup("").join(Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(*at) for at in places)
    outline = Markup('<polygon class="line" points="{}"/>').format(_points(places)) if len(places) == number else ""
    return Markup('<g class="series s{}"><title>{}</title>{}{}</g>').format(shape.style % 6, shape.name, outline, dots)


def legend_of(shapes: Sequence[Shape]) -> list[tuple[int, str]]:
    return [(shape.style, shape.name) for shape in shapes]


def values_in(columns: Sequence[str], row: Mapping[str, float]) -> list[float | None]:
    """Order a model's values as the spokes are; None for those it lacks."""
    return [row.get(column) for column in columns]
