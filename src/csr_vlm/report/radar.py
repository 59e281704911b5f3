"""Draw a radar chart as inline SVG: several models on several benchmarks, each on a scale of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from csr_vlm.core.formatting import fixed
from csr_vlm.report.charts import NUM_STYLES, indexed_tspans

WIDTH, HEIGHT, RADIUS = 560, 430, 138
_INNER = 0.2
"""Position of a spoke's worst value as a fraction of the radius; the best value lies at the rim."""
_NUM_RINGS = 4

SpokeScale = tuple[float, float] | None
"""(worst, best) value of a spoke; None if no model has a value."""


@dataclass(frozen=True)
class Spoke:
    """Represent one benchmark."""

    name: str
    lower_is_better: bool = False
    reference_values: Sequence[float] = ()
    """Values that widen the scale without being drawn, so that small gaps look small."""


@dataclass(frozen=True)
class RadarSeries:
    """Represent the values of one model, spoke by spoke; None where it has none."""

    name: str
    values: Sequence[float | None]
    style: int = 0


def radar(description: str, spokes: Sequence[Spoke], series: Sequence[RadarSeries]) -> Markup:
    """Draw the models as polygons; empty for fewer than three spokes.

    Each spoke runs from the worst value on it (inside) to the best (at the rim), so values can be
    compared along a spoke but not between spokes.
    """
    if len(spokes) < 3:
        return Markup("")
    scales = [_scale([line.values[index] for line in series], spoke) for index, spoke in enumerate(spokes)]
    parts = [_grid(len(spokes))]
    parts += [
        _label(index, len(spokes), spoke, scale)
        for index, (spoke, scale) in enumerate(zip(spokes, scales, strict=True))
    ]
    parts += [_polygon(line, scales) for line in series]
    return Markup('<svg class="chart radar" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, description, Markup("").join(parts)
    )


def _scale(values: Sequence[float | None], spoke: Spoke) -> SpokeScale:
    known = [value for value in values if value is not None]
    if not known:
        return None
    ends = (min([*known, *spoke.reference_values]), max([*known, *spoke.reference_values]))
    return ends[::-1] if spoke.lower_is_better else ends


def radial_position(value: float, scale: tuple[float, float]) -> float:
    """Return the distance of a value from the center: ``_INNER`` for the worst value, 1 for the best."""
    worst, best = scale
    return 1.0 if worst == best else _INNER + (1 - _INNER) * (value - worst) / (best - worst)


def _vertex(index: int, num_spokes: int, radius: float) -> tuple[float, float]:
    angle = 2 * math.pi * index / num_spokes - math.pi / 2
    return WIDTH / 2 + radius * math.cos(angle), HEIGHT / 2 + radius * math.sin(angle)


def _points(vertices: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in vertices)


def _grid(num_spokes: int) -> Markup:
    rings = [
        Markup('<polygon class="ring" points="{}"/>').format(
            _points([_vertex(index, num_spokes, RADIUS * ring / _NUM_RINGS) for index in range(num_spokes)])
        )
        for ring in range(1, _NUM_RINGS + 1)
    ]
    lines = [
        Markup('<line class="grid" x1="{}" y1="{}" x2="{:.1f}" y2="{:.1f}"/>').format(
            WIDTH // 2, HEIGHT // 2, *_vertex(index, num_spokes, RADIUS)
        )
        for index in range(num_spokes)
    ]
    return Markup("").join(rings + lines)


def _label(index: int, num_spokes: int, spoke: Spoke, scale: SpokeScale) -> Markup:
    x, y = _vertex(index, num_spokes, RADIUS + 19)
    y += 12 * (y > HEIGHT / 2 + RADIUS) - 14 * (y < HEIGHT / 2 - RADIUS)  # two lines above or below the chart
    anchor = "middle" if abs(x - WIDTH / 2) < 20 else "start" if x > WIDTH / 2 else "end"
    extent = "" if scale is None else f"{fixed(scale[0], 1)} → {fixed(scale[1], 1)}"
    return Markup(
        '<text class="spoke" text-anchor="{0}" x="{1:.1f}" y="{2:.1f}">{3}</text>'
        '<text class="extent" text-anchor="{0}" x="{1:.1f}" y="{2:.1f}" dy="1.2em">{4}</text>'
    ).format(anchor, x, y, indexed_tspans(spoke.name), extent)


def _polygon(series: RadarSeries, scales: Sequence[SpokeScale]) -> Markup:
    vertices = [
        _vertex(index, len(scales), RADIUS * radial_position(value, scale))
        for index, (value, scale) in enumerate(zip(series.values, scales, strict=True))
        if value is not None and scale is not None
    ]
    dots = Markup("").join(Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(*v) for v in vertices)
    # A polygon through missing values would suggest measurements that do not exist.
    complete = len(vertices) == len(scales)
    outline = Markup('<polygon class="line" points="{}"/>').format(_points(vertices)) if complete else ""
    return Markup('<g class="series s{}"><title>{}</title>{}{}</g>').format(
        series.style % NUM_STYLES, series.name, outline, dots
    )


def radar_legend(series: Sequence[RadarSeries]) -> list[tuple[int, str]]:
    """Return the (line style, name) of each model."""
    return [(line.style, line.name) for line in series]


def values_by_column(columns: Sequence[str], values: Mapping[str, float]) -> list[float | None]:
    """Order a model's values by column; None for those it lacks."""
    return [values.get(column) for column in columns]
