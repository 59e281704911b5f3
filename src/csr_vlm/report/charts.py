"""Small charts as inline SVG: drawn here, coloured by the page's style sheet.

Everything that has a colour has a class, so that one drawing serves light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from markupsafe import Markup

WIDTH, HEIGHT = 320, 196
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 20, 26
_INSET = 26
"""Room beside the outermost points, for their labels."""
_MOST_LABELS = 7
_MOST_POINTS = 48


@dataclass(frozen=True)
class Point:
    """A value over x, with its interval if it has one and what its tooltip says."""

    x: float
    value: float
    low: float | None = None
    high: float | None = None
    title: str = ""


@dataclass(frozen=True)
class Series:
    """Points that belong together; ``style`` 0.. picks colour and dashes."""

    name: str
    points: Sequence[Point]
    style: int = 0


@dataclass(frozen=True)
class Axes:
    """How a chart is framed."""

    from_zero: bool = False
    at_most: float | None = None
    digits: int = 3
    x_name: Callable[[float], str] = field(default=lambda x: f"{x:g}")
    x_ticks: Sequence[float] | None = None
    """None chooses round numbers."""
    marker: float | None = None
    """A value to compare with, drawn as a dashed line."""
    x_marker: float | None = None
    """A place on x to compare with, drawn the same."""
    label_points: bool = True


def chart(description: str, series: Sequence[Series], axes: Axes) -> Markup:
    """Draw lines over x with error bars; an empty string where there is nothing to draw.

    Args:
        description: What a screen reader says instead of the picture.
    """
    kept = [Series(s.name, [p for p in s.points if _finite(p)], s.style) for s in series]
    kept = [s for s in kept if s.points]
    if not kept:
        return Markup("")
    frame = _Frame.around(kept, axes)
    parts = [_y_axis(frame, axes), _x_axis(frame, axes)]
    if axes.marker is not None and frame.low <= axes.marker <= frame.high:
        y = frame.y(axes.marker)
        parts.append(_line(_LEFT, y, WIDTH - _RIGHT, y, "marker"))
    if axes.x_marker is not None and frame.left <= axes.x_marker <= frame.right:
        x = frame.x(axes.x_marker)
        parts.append(_line(x, frame.y(frame.low), x, _TOP, "marker"))
    parts += [_series(frame, item) for item in kept]
    if axes.label_points:
        parts.append(_labels(frame, kept, axes))
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, description, Markup("").join(parts)
    )


def smoothed(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """Average neighbours until no more than ``most`` points are left."""
    size = math.ceil(len(points) / most)
    if size <= 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [Point(fmean(p.x for p in group), fmean(p.value for p in group)) for group in groups]


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """List round numbers that enclose low..high in about ``count`` steps of 1, 2, 2.5 or 5.

    Example:
        >>> nice_ticks(0, 0.41)
        [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    """
    span = max(high - low, 1e-9)
    magnitude = 10.0 ** math.floor(math.log10(span / count))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude * count >= span * 0.8)
    # A value a hair beyond a tick, such as a margin of -1e-7, does not ask for one more.
    first, last = math.floor(low / step + 1e-3), math.ceil(high / step - 1e-3)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True)
class _Frame:
    """Where the data lie and where they are drawn."""

    left: float
    right: float
    low: float
    high: float
    y_ticks: tuple[float, ...]
    x_values: tuple[float, ...]

    @classmethod
    def around(cls, series: Sequence[Series], axes: Axes) -> _Frame:
        points = [point for item in series for point in item.points]
        values = [v for p in points for v in (p.value, p.low, p.high) if v is not None]
        if axes.marker is not None:
            values.append(axes.marker)
        low, high = min(values), max(values)
        if axes.from_zero:
            low = min(low, 0.0)
        if low == high:
            room = abs(high) * 0.1 or 1.0
            low, high = (low, high + room) if axes.from_zero else (low - room, high + room)
        elif not axes.from_zero and len(series) > 1 and axes.label_points:
            low -= 0.2 * (high - low)  # room for the labels below the lower line
        if axes.at_most is not None:
            high = max(min(high, axes.at_most), min(values))
        ticks = nice_ticks(low, high)
        xs = sorted({point.x for point in points} | set(axes.x_ticks or ()))
        return cls(xs[0], xs[-1], ticks[0], ticks[-1], tuple(ticks), tuple(xs))

    def x(self, value: float) -> float:
        if self.left == self.right:
            return (_LEFT + WIDTH - _RIGHT) / 2
        inset = _INSET if len(self.x_values) <= _MOST_LABELS else 6
        share = (value - self.left) / (self.right - self.left)
        return _LEFT + inset + share * (WIDTH - _RIGHT - _LEFT - 2 * inset)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return HEIGHT - _BOTTOM - share * (HEIGHT - _BOTTOM - _TOP)


def _finite(point: Point) -> bool:
    return all(math.isfinite(v) for v in (point.x, point.value, point.low, point.high) if v is not None)


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(css, x1, y1, x2, y2)


def _text(x: float, y: float, text: str, css: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(css, x, y, text)


def _y_axis(frame: _Frame, axes: Axes) -> Markup:
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
    ticks = ticks[:: math.ceil(len(ticks) / 12)] if ticks else []
    labels = [_text(frame.x(tick), HEIGHT - 8, axes.x_name(tick), "tick x") for tick in ticks]
    return Markup("").join(labels)


def _series(frame: _Frame, series: Series) -> Markup:
    path = " ".join(f"{frame.x(p.x):.1f},{frame.y(p.value):.1f}" for p in series.points)
    parts = [Markup('<polyline class="line" points="{}"/>').format(path)] if len(series.points) > 1 else []
    if len(series.points) <= 2 * _MOST_LABELS:
        parts += [_dot(frame, point) for point in series.points]
    return Markup('<g class="series s{}"><title>{}</title>{}</g>').format(
        series.style % 6, series.name, Markup("").join(parts)
    )


def _dot(frame: _Frame, point: Point) -> Markup:
    x, y = frame.x(point.x), frame.y(point.value)
    parts = []
    if point.low is not None and point.high is not None:
        top, bottom = frame.y(min(point.high, frame.high)), frame.y(max(point.low, frame.low))
        parts.append(_line(x, top, x, bottom, "whisker"))
        parts += [_line(x - 4, end, x + 4, end, "whisker") for end in (top, bottom)]
    if point.title:
        # A target that a finger or an unsteady pointer can hit.
        parts.append(Markup('<circle class="target" cx="{:.1f}" cy="{:.1f}" r="13"/>').format(x, y))
    parts.append(Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="3.6"/>').format(x, y))
    title = Markup("<title>{}</title>").format(point.title) if point.title else Markup("")
    return Markup("<g>{}{}</g>").format(title, Markup("").join(parts))


def _labels(frame: _Frame, series: Sequence[Series], axes: Axes) -> Markup:
    """Write values at the points: the highest of an iteration above, the lowest below."""
    if len(series) > 2:
        return Markup("")
    parts = []
    for item in series:
        shown = item.points if len(item.points) <= _MOST_LABELS else [item.points[0], item.points[-1]]
        for point in shown:
            others = [p.value for other in series if other is not item for p in other.points if p.x == point.x]
            below = any(value > point.value for value in others)
            end = frame.y(point.value)
            if below and point.low is not None:
                end = frame.y(point.low)
            elif not below and point.high is not None:
                end = frame.y(min(point.high, frame.high))
            text = f"{point.value:.{axes.digits}f}".replace("-", "−")
            parts.append(_text(frame.x(point.x), end + (16 if below else -7), text, "value"))
    return Markup("").join(parts)
