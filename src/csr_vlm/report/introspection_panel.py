"""Build the report's charts of what changed inside the model, from ``RUN/analysis.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from csr_vlm.core.formatting import fixed, interval, percent, plural, signed
from csr_vlm.evaluation.compare import policy_name
from csr_vlm.report.charts import Axes, Point, Series, chart
from csr_vlm.report.number_table import NumberTable, TableRow
from csr_vlm.report.panels import Figure
from csr_vlm.store import files
from csr_vlm.store.run import Run

_SIDES = ("before", "after")
_NOTICEABLE = 0.05
"""Smallest change of a layer's relative attention to the image that counts as a change."""


@dataclass(frozen=True)
class IntrospectionPanel:
    """Hold the charts, a summary in words, and the numbers behind them."""

    iteration: int
    summary: Sequence[str]
    figures: Sequence[Figure]
    tables: Sequence[NumberTable]
    protocol: Mapping[str, Any]


def introspection_panel(run: Run) -> IntrospectionPanel | None:
    """Read the stored analysis; None if there is none, or if it is not of the run's result."""
    path = run.root / "analysis.json"
    if not path.is_file():
        return None
    analysis = files.read_json(path)
    if analysis["iteration"] != run.final:
        return None
    names = (policy_name(0), policy_name(analysis["iteration"]))
    figures = [_attention(analysis, names), _relevance(analysis, names), _separability(analysis)]
    return IntrospectionPanel(
        analysis["iteration"],
        [_attention_summary(analysis), _separability_summary(analysis)],
        [figure for figure in figures if figure is not None and figure.svg],
        [_attention_table(analysis), _separability_table(analysis)],
        analysis["attention"]["protocol"],
    )


def _legend(names: Sequence[str]) -> list[tuple[int, str]]:
    return list(enumerate(names))


def _chart(label: str, series: Sequence[Series], axes: Axes) -> Markup:
    text = "; ".join(point.title for line in series for point in line.points if point.title)
    return chart(f"{label}: {text}" if text else label, series, axes)


def _attention(analysis: Mapping[str, Any], names: Sequence[str]) -> Figure:
    layers = analysis["attention"]["layers"]
    series = [
        Series(
            name,
            [
                Point(
                    number,
                    layer["beyond_sinks"][side],
                    title=f"layer {number}, {name}: {fixed(layer['beyond_sinks'][side])}",
                )
                for number, layer in enumerate(layers, start=1)
            ],
            style,
        )
        for style, (side, name) in enumerate(zip(_SIDES, names, strict=True))
    ]
    axes = Axes(digits=2, horizontal_line=1.0, format_x=lambda x: f"{x:g}", x_ticks=range(1, len(layers) + 1))
    return Figure(
        "Attention to the image",
        "relative to uniform attention, without attention sinks",
        "by layer; dotted line: uniform attention",
        _chart("Attention to the image", series, axes),
        _legend(names),
    )


def _relevance(analysis: Mapping[str, Any], names: Sequence[str]) -> Figure | None:
    relevance = analysis["relevance"]
    if relevance is None:
        return None
    edges = relevance["edges"]
    series = [
        Series(
            name,
            [Point((a + b) / 2, share) for a, b, share in zip(edges, edges[1:], relevance[side], strict=False)],
            style,
        )
        for style, (side, name) in enumerate(zip(_SIDES, names, strict=True))
    ]
    axes = Axes(from_zero=True, digits=2, label_points=False)
    hint = "by mean R_I of a response, 0 to 100"
    svg = _chart("Relevance of responses", series, axes)
    return Figure("Relevance of responses", "share of evaluated responses", hint, svg, _legend(names))


def _separability(analysis: Mapping[str, Any]) -> Figure | None:
    own_pairs = [row for row in analysis["separability"] if row["pairs"] != "external"]
    series = []
    for style, (side, name) in enumerate(zip(_SIDES, ("before training on them", "after"), strict=True)):
        points = []
        for row in own_pairs:
            metric = row[side]["auc"]
            title = f"pairs of {row['pairs']}, {name}: {fixed(metric['value'])}"
            points.append(Point(row["to"], metric["value"], metric["low"], metric["high"], title))
        series.append(Series(name, points, style))
    axes = Axes(digits=2, horizontal_line=0.5, upper_bound=1.0, x_ticks=[row["to"] for row in own_pairs])
    return Figure(
        "Separability of chosen and rejected",
        "AUC of the log-probability per token",
        "by iteration of the pairs; dotted line: chance",
        _chart("Separability of chosen and rejected", series, axes),
        _legend([line.name for line in series]),
    )


def _attention_summary(analysis: Mapping[str, Any]) -> str:
    layers = [layer["beyond_sinks"] for layer in analysis["attention"]["layers"]]
    significant = [layer for layer in layers if layer["low"] > 0 or layer["high"] < 0]
    large = [layer for layer in significant if abs(layer["value"]) >= _NOTICEABLE]
    if not large:
        largest = max((abs(layer["value"]) for layer in layers), default=0.0)
        return (
            f"Attention to the image is unchanged: no layer changed significantly by {_NOTICEABLE} or more relative "
            f"to uniform attention (largest change: {fixed(largest)})."
        )
    num_more = sum(layer["value"] > 0 for layer in large)
    return (
        f"Of {plural(len(layers), 'layer')}, {num_more} attend significantly more to the image than before and "
        f"{len(large) - num_more} less; the largest change is {signed(max((c['value'] for c in large), key=abs))} "
        "relative to uniform attention."
    )


def _separability_summary(analysis: Mapping[str, Any]) -> str:
    first = analysis["separability"][0]
    before, after = (first[side]["preferred"]["value"] for side in _SIDES)
    text = (
        f"The base model assigns the chosen response a higher log-probability per token in {percent(before)} of the "
        f"first pairs; after training on them, the policy does so in {percent(after)}."
    )
    external = next((row for row in analysis["separability"] if row["pairs"] == "external"), None)
    if external is not None:
        own_auc, external_auc = (row["before"]["auc"]["value"] for row in (first, external))
        comparison = "easier" if external_auc > own_auc else "harder"
        text += (
            f" External pairs are {comparison} for it to separate (AUC {fixed(external_auc)}, own pairs "
            f"{fixed(own_auc)}); pairs that a model already separates provide less training signal."
        )
    return text


def _attention_table(analysis: Mapping[str, Any]) -> NumberTable:
    rows = [
        TableRow(
            f"layer {number}",
            [
                (fixed(layer["mass"]["before"]), ""),
                (fixed(layer["mass"]["after"]), ""),
                *_change_cells(layer["relative"]),
                *_change_cells(layer["beyond_sinks"]),
            ],
        )
        for number, layer in enumerate(analysis["attention"]["layers"], start=1)
    ]
    columns = [
        "attention mass, base",
        "attention mass, after",
        "relative to uniform, base",
        "change",
        "without sinks, base",
        "change",
    ]
    return NumberTable("Attention to the image by layer, with 95 % intervals of the change", "Layer", columns, rows)


def _change_cells(change: Mapping[str, Any]) -> list[tuple[str, str]]:
    bounds = f"{signed(change['low'])} to {signed(change['high'])}"
    return [(fixed(change["before"]), ""), (signed(change["value"]), bounds)]


def _separability_table(analysis: Mapping[str, Any]) -> NumberTable:
    def cell(metric: Mapping[str, Any]) -> tuple[str, str]:
        return fixed(metric["value"]), interval(metric["low"], metric["high"])

    rows = []
    for row in analysis["separability"]:
        cells = [cell(row[side][name]) for name in ("preferred", "margin", "auc") for side in _SIDES]
        rows.append(TableRow(f"{row['pairs']}", [*cells, cell(row["implicit_reward"]["auc"])]))
    columns = [f"{name}, {side}" for name in ("prefers chosen", "margin, nats per token", "AUC") for side in _SIDES]
    note = (
        "Prefers chosen: share of pairs whose chosen response has the higher log-probability per token. AUC: "
        "probability that a random chosen response has a higher one than a random rejected response. Learned: AUC of "
        "DPO’s implicit reward per token, which training added. Before: the policy that training on the pairs "
        "started from."
    )
    title = "Separability of chosen and rejected responses"
    return NumberTable(title, "Pairs of", [*columns, "AUC, learned"], rows, note)
