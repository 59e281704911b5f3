"""Draw the plots of ``docs/evidence``, all in one style.

Every panel has a title with the direction of improvement, the base model as a dotted line, a legend, an
interval wherever one is known, and says so where its axis does not start at 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csr_vlm.evaluation.metrics import MetricSpec, metric_spec
from csr_vlm.evaluation.statistics import Metric

STYLE = {
    "axes.edgecolor": "#8d9199",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.prop_cycle": "cycler('color', ['#0b6bb5', '#b4530a', '#0f7b5f', '#8c4aa3', '#5c616b'])",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "font.size": 9,
    "grid.color": "#e4e1db",
    "legend.frameon": False,
    "lines.markersize": 5,
    "svg.hashsalt": "csr-vlm",
}
_PANEL = 3.4, 3.0
"""Width and height of a panel in inches."""
_ARROWS = {"lower": "↓ lower is better", "higher": "↑ higher is better", "none": ""}


@dataclass(frozen=True)
class Line:
    """Hold the values of one setting over x."""

    label: str
    """Empty for a line that the legend leaves out."""
    points: Sequence[tuple[float, Mapping[str, Metric]]]
    """(x, metric by name); metrics without bounds get no interval."""
    faint: bool = False
    """Whether this is one seed behind its mean."""


def draw(
    path: Path,
    names: Sequence[str],
    lines: Sequence[Line],
    x_label: str,
    *,
    base: Mapping[str, Metric] | None = None,
    x_ticks: Sequence[float] | None = None,
) -> None:
    """Write a figure with a panel per metric.

    Args:
        path: PNG or SVG file.
        names: Keys of the metrics.
        lines: What is compared.
        x_label: Label of the horizontal axes.
        base: The base model, drawn as a dotted line.
        x_ticks: Positions of the labels on the horizontal axes; None leaves them to matplotlib.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    with mpl.rc_context(STYLE):
        size = (_PANEL[0] * len(names), _PANEL[1])
        figure, axes = plt.subplots(1, len(names), figsize=size, layout="constrained", squeeze=False)
        for axis, name in zip(axes[0], names, strict=True):
            _panel(axis, name, lines, base)
            axis.set_xlabel(x_label)
            if x_ticks is not None:
                axis.set_xticks(x_ticks)
        handles, labels = axes[0][0].get_legend_handles_labels()
        if len(labels) > 1:
            figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5))
        figure.savefig(path, dpi=110, metadata={"Software": None} if path.suffix == ".png" else {"Date": None})
        plt.close(figure)


def _panel(axis: Any, name: str, lines: Sequence[Line], base: Mapping[str, Metric] | None) -> None:
    spec = metric_spec(name)
    if base is not None and (level := base[name].value) is not None:
        axis.axhline(level, color="#5c616b", linestyle=":", linewidth=1.4, label="base model")
    for line in lines:
        known = sorted((x, values[name]) for x, values in line.points if values[name].value is not None)
        xs, levels = [x for x, _ in known], [metric.value for _, metric in known]
        if line.faint:
            axis.plot(xs, levels, color="#8d9199", linewidth=0.8, alpha=0.6, label=line.label or None)
            continue
        (drawn,) = axis.plot(xs, levels, marker="o", label=line.label or None)
        bars = [(x, m.value, m.value - m.low, m.high - m.value) for x, m in known if m.low is not None]
        if bars:
            at, middle, below, above = zip(*bars, strict=True)
            axis.errorbar(at, middle, (below, above), fmt="none", ecolor=drawn.get_color(), capsize=3, linewidth=1.2)
    _limit(axis, spec)


def _limit(axis: Any, spec: MetricSpec) -> None:
    """Start the vertical axis at 0, or say that it does not; end it where values end."""
    low, high = axis.get_ylim()
    top = high if spec.upper_bound is None else min(high, spec.upper_bound + 0.02 * (spec.upper_bound - low))
    note = _ARROWS[spec.better]
    if spec.axis_from_zero:
        axis.set_ylim(0, top)
    else:
        axis.set_ylim(low, top)
        note = ", ".join(filter(None, (note, "axis does not start at 0")))
    label = spec.label.replace("_S", "$_S$").replace("_I", "$_I$")
    axis.set_title(f"{label}\n{note}" if note else label)
