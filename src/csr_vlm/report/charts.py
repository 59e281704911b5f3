"""Draw small line charts as inline SVG.

Colors come from the style sheet of the page through classes, so that one drawing works in light
mode, in dark mode and in print.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from markupsafe import Markup

from csr_vlm.core.formatting import indexed

WIDTH, HEIGHT = 320, 196
NUM_STYLES = 6
"""Line styles that the style sheets define."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 20, 26
_INSETS = 20, 37
"""Space left and right of the outermost points, for their labels."""
_MAX_LABELS = 7
_MAX_POINTS = 48
_MAX_TICKS = 12


@dataclass(frozen=True)
class Point:
    """Represent a value at x, with an optional interval and tooltip."""

    x: float
    value: float
    low: float | None = None
    high: float | None = None
    title: str = ""


@dataclass(frozen=True)
class Series:
    """Represent the points of one line; ``style`` selects its color and dashes."""

    name: str
    points: Sequence[Point]
    style: int = 0


@dataclass(frozen=True)
class Axes:
    """Configure the frame of a chart."""

    from_zero: bool = False
    """Whether the vertical axis starts at 0."""
    upper_bound: float | None = None
    """Largest possible value; intervals are drawn no higher."""
    digits: int = 3
    """Decimals of the labels at the points."""
    format_x: Callable[[float], str] = field(default=lambda x: f"{x:g}")
    x_ticks: Sequence[float] | None = None
    """Positions of the labels on the horizontal axis; None chooses whole numbers."""
    horizontal_line: float | None = None
    """A value to compare with, drawn as a dotted line."""
    vertical_line: float | None = None
    """A position on the horizontal axis to compare with, drawn as a dotted line."""
    label_points: bool = True


def chart(description: str, series: Sequence[Series], axes: Axes) -> Markup:
    """Draw lines with error bars as an ``svg`` element.

    Args:
        description: Alternative text for screen readers.
        series: Lines; points that are not finite are dropped.
        axes: The frame.

    Returns:
        The element; empty if there is no point to draw.
    """
    body = chart_body(series, axes)
    if not body:
        return body
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, description, body
    )


def chart_body(series: Sequence[Series], axes: Axes) -> Markup:
    """Draw what is inside a chart, ``WIDTH`` by ``HEIGHT`` units; empty if there is no point to draw."""
    finite = [Series(line.name, [p for p in line.points if _is_finite(p)], line.style) for line in series]
    drawn = [line for line in finite if line.points]
    if not drawn:
        return Markup("")
    frame = _Frame.around(drawn, axes)
    parts = [_y_axis(frame), _x_axis(frame, axes)]
    if axes.horizontal_line is not None and frame.low <= axes.horizontal_line <= frame.high:
        y = frame.y(axes.horizontal_line)
        parts.append(_line(_LEFT, y, WIDTH - _RIGHT, y, "guide"))
    if axes.vertical_line is not None and frame.left <= axes.vertical_line <= frame.right:
        x = frame.x(axes.vertical_line)
        parts.append(_line(x, frame.y(frame.low), x, _TOP, "guide"))
    parts += [_series(frame, line) for line in drawn]
    if axes.label_points:
        parts.append(_value_labels(frame, drawn, axes))
    return Markup("").join(parts)


def indexed_tspans(text: str) -> Markup:
    """Escape a text for SVG and lower the subscripts of CHAIR_S, CHAIR_I, R_I and R_T."""
    first, *rest = re.split("<sub>|</sub>", str(indexed(text)))
    parts = [first]
    for subscript, following in zip(rest[::2], rest[1::2], strict=True):
        parts.append(f'<tspan class="sub" dy="3">{subscript}</tspan>')
        parts.append(f'<tspan dy="-3">{following}</tspan>' if following else "")
    return Markup("".join(parts))  # noqa: S704 - escaped by indexed


def smoothed(points: Sequence[Point], max_points: int = _MAX_POINTS) -> list[Point]:
    """Average neighboring points until at most ``max_points`` are left."""
    size = math.ceil(len(points) / max_points)
    if size <= 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [Point(fmean(p.x for p in group), fmean(p.value for p in group)) for group in groups]


def nice_ticks(low: float, high: float, num_steps: int = 4) -> list[float]:
    """List round numbers that enclose low..high in about ``num_steps`` steps of 1, 2, 2.5 or 5 times a power of 10.

    Example:
        >>> nice_ticks(0, 0.41)
        [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    """
    span = max(high - low, 1e-9)
    magnitude = 10.0 ** math.floor(math.log10(span / num_steps))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude * num_steps >= span * 0.8)
    # A value slightly beyond a tick, such as a margin of -1e-7, does not need another tick.
    first, last = math.floor(low / step + 1e-3), math.ceil(high / step - 1e-3)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True)
class _Frame:
    """Map values to positions in the drawing."""

    left: float
    right: float
    low: float
    high: float
    y_ticks: tuple[float, ...]
    x_values: tuple[float, ...]

    @classmethod
    def around(cls, series: Sequence[Series], axes: Axes) -> _Frame:
        """Enclose all points, their intervals and the horizontal line."""
        points = [point for line in series for point in line.points]
        values = [v for p in points for v in (p.value, p.low, p.high) if v is not None]
        if axes.horizontal_line is not None:
            values.append(axes.horizontal_line)
        low, high = min(values), max(values)
        if axes.from_zero:
            low = min(low, 0.0)
        if low == high:
            margin = abs(high) * 0.1 or 1.0
            low, high = (low, high + margin) if axes.from_zero else (low - margin, high + margin)
        elif not axes.from_zero and len(series) > 1 and axes.label_points:
            low -= 0.2 * (high - low)  # space for the labels below the lower line
        if axes.upper_bound is not None:
            high = max(min(high, axes.upper_bound), min(values))
        ticks = nice_ticks(low, high)
        xs = sorted({point.x for point in points} | set(axes.x_ticks or ()))
        return cls(xs[0], xs[-1], ticks[0], ticks[-1], tuple(ticks), tuple(xs))

    def x(self, value: float) -> float:
        """Return the horizontal position of a value."""
        if self.left == self.right:
            return (_LEFT + WIDTH - _RIGHT) / 2
        before, after = _INSETS if len(self.x_values) <= _MAX_LABELS else (6, 6)
        fraction = (value - self.left) / (self.right - self.left)
        return _LEFT + before + fraction * (WIDTH - _RIGHT - _LEFT - before - after)

    def y(self, value: float) -> float:
        """Return the vertical position of a value."""
        fraction = (value - self.low) / (self.high - self.low)
        return HEIGHT - _BOTTOM - fraction * (HEIGHT - _BOTTOM - _TOP)


def _is_finite(point: Point) -> bool:
    return all(math.isfinite(v) for v in (point.x, point.value, point.low, point.high) if v is not None)


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(css, x1, y1, x2, y2)


def _text(x: float, y: float, text: str, css: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(css, x, y, text)


def _y_axis(frame: _Frame) -> Markup:
    step = frame.y_ticks[1] - frame.y_ticks[0]
    digits = max(0, min(6, max(-math.floor(math.log10(step) + 1e-9), 0) + (f"{step:.1e}"[2] == "5")))
    parts = []
    for tick in frame.y_ticks:
        y = frame.y(tick)
        parts.append(_line(_LEFT, y, WIDTH - _RIGHT, y, "axis" if tick == frame.low else "grid"))
        parts.append(_text(_LEFT - 6, y + 3.5, f"{tick:.{digits}f}".replace("-", "−"), "tick y"))
    return Markup("").join(parts)


def _x_axis(frame: _Frame, axes: Axes) -> Markup:
    ticks = axes.x_ticks
    if ticks is None:
        ticks = [t for t in nice_ticks(frame.left, frame.right) if frame.left <= t <= frame.right and t == int(t)]
    ticks = ticks[:: math.ceil(len(ticks) / _MAX_TICKS)] if ticks else []
    labels = [_text(frame.x(tick), HEIGHT - 8, axes.format_x(tick), "tick x") for tick in ticks]
    return Markup("").join(labels)


def _series(frame: _Frame, series: Series) -> Markup:
    path = " ".join(f"{frame.x(p.x):.1f},{frame.y(p.value):.1f}" for p in series.points)
    parts = [Markup('<polyline class="line" points="{}"/>').format(path)] if len(series.points) > 1 else []
    if len(series.points) <= 2 * _MAX_LABELS:
        parts += [_dot(frame, point) for point in series.points]
    return Markup('<g class="series s{}"><title>{}</title>{}</g>').format(
        series.style % NUM_STYLES, series.name, Markup("").join(parts)
    )


def _dot(frame: _Frame, point: Point) -> Markup:
    x, y = frame.x(point.x), frame.y(point.value)
    parts = []
    if point.low is not None and point.high is not None:
        top, bottom = frame.y(min(point.high, frame.high)), frame.y(max(point.low, frame.low))
        parts.append(_line(x, top, x, bottom, "whisker"))
        parts += [_line(x - 4, end, x + 4, end, "whisker") for end in (top, bottom)]
    if point.title:
        # Large enough to hit with a finger.
        parts.append(Markup('<circle class="target" cx="{:.1f}" cy="{:.1f}" r="13"/>').format(x, y))
    parts.append(Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="3.6"/>').format(x, y))
    title = Markup("<title>{}</title>").format(point.title) if point.title else Markup("")
    return Markup("<g>{}{}</g>").format(title, Markup("").join(parts))


def _value_labels(frame: _Frame, series: Sequence[Series], axes: Axes) -> Markup:
    """Label the points of one or two lines: above the point or, for the lower of two, below it."""
    if len(series) > 2:
        return Markup("")
    parts = []
    for line in series:
        labeled = line.points if len(line.points) <= _MAX_LABELS else [line.points[0], line.points[-1]]
        for point in labeled:
            values = [p.value for other in series if other is not line for p in other.points if p.x == point.x]
            below = any(value > point.value or (value == point.value and line is not series[0]) for value in values)
            text = f"{point.value:.{axes.digits}f}".replace("-", "−")
            x, y = frame.x(point.x), frame.y(point.value)
            if point.low is None and point.high is None:
                parts.append(_text(x, y + (16 if below else -7), text, "value"))
            else:  # beside the whisker: at its end, a number would look like that of the bound
                parts.append(_text(x + 6, y + (14 if below else -5), text, "value beside"))
    return Markup("").join(parts)
