"""Draw the distributions of true and false texts, one row per group, as inline SVG.

Each row has two densities on a common axis: true texts above the row's line, false ones below it.
Colors come from the style sheet of the page, or from :data:`STANDALONE_STYLE` in a file of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from csr_vlm.report.charts import nice_ticks

WIDTH = 720
_LEFT, _RIGHT, _TOP, _BOTTOM, _ROW = 132, 128, 22, 44, 64
_HEIGHT_OF_DENSITY = 24
_POINTS = 160
_FEWEST = 2
STANDALONE_STYLE = """\
text { font: 12px -apple-system, "Segoe UI", Roboto, Arial, "DejaVu Sans", sans-serif; fill: #1a1c20; }
.page { fill: #fff; } .tick, .muted { fill: #5c616b; } .middle { text-anchor: middle; } .end { text-anchor: end; }
.grid { stroke: #e4e1db; } .axis { stroke: #8d9199; } .guide { stroke: #1a1c20; stroke-dasharray: 4 3; }
.s0 { --c: #0b6bb5; } .s1 { --c: #b9520c; } .density { fill: var(--c); fill-opacity: 0.32; stroke: var(--c); }
.mean { stroke: var(--c); stroke-width: 2.2; } .mark { fill: var(--c); fill-opacity: 0.7; }
"""
_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """Represent one group of texts."""

    name: str
    true: Sequence[float]
    false: Sequence[float]
    note: str = ""
    """Shown at the right, such as the AUC."""
    counts: str = ""
    """Shown below the note; by default the numbers of true and false texts."""


def distribution_chart(
    description: str, rows: Sequence[Row], axis_title: str, zero_line: float | None = None, standalone: bool = False
) -> Markup:
    """Draw the densities of every row with a value.

    Args:
        description: Alternative text for screen readers.
        rows: Groups, from top to bottom.
        axis_title: Title of the horizontal axis.
        zero_line: A value to mark in all rows, labeled "zero line".
        standalone: Whether the drawing is a file of its own, with colors and a background.

    Returns:
        The element; empty if no row has a value.
    """
    drawn = [row for row in rows if len(row.true) or len(row.false)]
    if not drawn:
        return Markup("")
    values = np.concatenate([np.asarray([*row.true, *row.false], dtype=float) for row in drawn])
    ends = [*np.percentile(values, [0.5, 99.5]).tolist(), *([] if zero_line is None else [zero_line])]
    ticks = nice_ticks(min(ends), max(ends), 6)
    axis = _Axis(ticks[0], ticks[-1], len(drawn))
    width = _bandwidth(values)
    parts = [_grid(axis, ticks, axis_title)]
    parts += [_row(axis, index, row, width) for index, row in enumerate(drawn)]
    if zero_line is not None and axis.low <= zero_line <= axis.high:
        x = axis.x(zero_line)
        parts.append(_line("guide", x, _TOP - 6, x, axis.bottom))
        parts.append(_text("tick middle", x, _TOP - 10, "zero line"))
    if standalone:  # a page has its own legend
        for index, name in enumerate(("true, above", "false, below")):
            x, y = 12.0, axis.bottom + 16 + 19 * index
            mark = Markup('<circle class="mark" cx="{:.1f}" cy="{:.1f}" r="4"/>').format(x + 4, y - 4)
            parts.append(Markup('<g class="s{}">{}</g>').format(index, mark))
            parts.append(_text("tick", x + 14, y, name))
    style = Markup("<style>{}</style>").format(Markup(STANDALONE_STYLE)) if standalone else Markup("")  # noqa: S704
    page = (
        Markup('<rect class="page" width="{}" height="{}"/>').format(WIDTH, axis.height) if standalone else Markup("")
    )
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" class="chart distributions" viewBox="0 0 {} {}" role="img" '
        'aria-label="{}"><title>{}</title>{}{}{}</svg>'
    ).format(WIDTH, axis.height, description, description, style, page, Markup("").join(parts))


@dataclass(frozen=True)
class _Axis:
    """Map values and rows to positions."""

    low: float
    high: float
    num_rows: int

    @property
    def bottom(self) -> float:
        return _TOP + self.num_rows * _ROW

    @property
    def height(self) -> float:
        return self.bottom + _BOTTOM

    def x(self, value: float) -> float:
        """Return the horizontal position of a value, clipped to the axis."""
        fraction = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return _LEFT + fraction * (WIDTH - _LEFT - _RIGHT)

    def y(self, index: int) -> float:
        """Return the vertical position of a row's line."""
        return _TOP + index * _ROW + _ROW / 2


def _bandwidth(values: _Array) -> float:
    """Return Silverman's bandwidth, 0.9 min(sd, interquartile range / 1.34) n^(-1/5), of all rows together."""
    quartiles = np.percentile(values, [25, 75]).tolist()
    spread = min(float(values.std()), (quartiles[1] - quartiles[0]) / 1.34) or float(values.std()) or 1e-3
    return float(0.9 * spread * len(values) ** -0.2)


def _grid(axis: _Axis, ticks: Sequence[float], title: str) -> Markup:
    digits = max(len(f"{tick:g}".partition(".")[2]) for tick in ticks)
    parts = []
    for tick in ticks:
        x = axis.x(tick)
        parts.append(_line("grid", x, _TOP, x, axis.bottom))
        parts.append(_text("tick middle", x, axis.bottom + 16, f"{tick:.{digits}f}".replace("-", "−")))
    parts.append(_text("tick middle", (_LEFT + WIDTH - _RIGHT) / 2, axis.bottom + 35, title))
    return Markup("").join(parts)


def _row(axis: _Axis, index: int, row: Row, width: float) -> Markup:
    y = axis.y(index)
    grid = np.linspace(axis.low, axis.high, _POINTS)
    curves = [_density(np.asarray(side, dtype=float), grid, width) for side in (row.true, row.false)]
    highest = max(float(curve.max()) for curve in curves) or 1.0
    parts = [_line("axis", _LEFT, y, WIDTH - _RIGHT, y), _text("end", _LEFT - 12, y + 4, row.name)]
    for style, (side, curve) in enumerate(zip((row.true, row.false), curves, strict=True)):
        up = -1 if style == 0 else 1
        parts.append(_side(axis, y, side, grid, curve / highest, up, style))
    note = row.counts or f"{len(row.true)} true, {len(row.false)} false"
    parts.append(_text("tick", WIDTH - _RIGHT + 12, y + (16 if row.note else 4), note))
    if row.note:
        parts.append(_text("", WIDTH - _RIGHT + 12, y, row.note))
    return Markup("<g>{}</g>").format(Markup("").join(parts))


def _side(axis: _Axis, y: float, values: Sequence[float], grid: _Array, curve: _Array, up: int, style: int) -> Markup:
    """Draw one density and its mean; single values as marks."""
    if not len(values):
        return Markup("")
    name = ("true", "false")[style]
    if len(values) < _FEWEST:
        mark = Markup('<circle class="mark" cx="{:.1f}" cy="{:.1f}" r="3.5"/>').format(axis.x(values[0]), y + up * 7)
        return Markup('<g class="s{}"><title>{}: {:.3f}</title>{}</g>').format(style, name, values[0], mark)
    points = " ".join(
        f"{axis.x(value):.1f},{y + up * height * _HEIGHT_OF_DENSITY:.1f}"
        for value, height in zip(grid.tolist(), curve.tolist(), strict=True)
    )
    start, end = axis.x(axis.low), axis.x(axis.high)
    shape = Markup('<polygon class="density" points="{:.1f},{:.1f} {} {:.1f},{:.1f}"/>').format(
        start, y, points, end, y
    )
    mean = float(np.mean(values))
    line = _line("mean", axis.x(mean), y, axis.x(mean), y + up * _HEIGHT_OF_DENSITY)
    return Markup('<g class="s{}"><title>{}: mean {:.3f}, n {}</title>{}{}</g>').format(
        style, name, mean, len(values), shape, line
    )


def _density(values: _Array, grid: _Array, width: float) -> _Array:
    """Return a Gaussian kernel density on the grid, of shape (points,)."""
    if not len(values):
        return np.zeros_like(grid)
    curve: _Array = np.exp(-0.5 * ((grid[:, None] - values[None, :]) / width) ** 2).mean(axis=1)
    return curve


def _line(css: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(css, x1, y1, x2, y2)


def _text(css: str, x: float, y: float, text: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(css, x, y, text)
