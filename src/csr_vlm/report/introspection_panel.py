"""The part of the report that shows what changed inside the model: ``RUN/analysis.json`` as figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from csr_vlm.core.formatting import fixed, percent, signed
from csr_vlm.report.charts import Axes, Point, Series, chart
from csr_vlm.report.grid import Grid, Row
from csr_vlm.report.panels import Figure
from csr_vlm.store import files
from csr_vlm.store.run import Run

_SIDES = ("before", "after")
_NOTICEABLE = 0.05
"""A change of the image's weight by less than this share of its even share is called none."""


@dataclass(frozen=True)
class Panel:
    """Figures, what they come to in words, and the numbers behind them."""

    iteration: int
    findings: Sequence[str]
    figures: Sequence[Figure]
    grids: Sequence[Grid]
    protocol: Mapping[str, Any]


def analysis_panel(run: Run) -> Panel | None:
    """Read what ``csr analyze`` found; None where it has not been run, or not for the run's result."""
    path = run.root / "analysis.json"
    if not path.is_file():
        return None
    found = files.read_json(path)
    if found["iteration"] != run.final:
        return None
    names = ("base model", f"iteration {found['iteration']}")
    figures = [_attention(found, names), _relevance(found, names), _separability(found)]
    return Panel(
        found["iteration"],
        [_attention_words(found), _separability_words(found)],
        [figure for figure in figures if figure is not None and figure.svg],
        [_layers(found), _pairs(found)],
        found["attention"]["protocol"],
    )


def _legend(names: Sequence[str]) -> list[tuple[int, str]]:
    return list(enumerate(names))


def _drawn(label: str, series: Sequence[Series], axes: Axes) -> Markup:
    text = "; ".join(point.title for line in series for point in line.points if point.title)
    return chart(f"{label}: {text}" if text else label, series, axes)


def _attention(found: Mapping[str, Any], names: Sequence[str]) -> Figure:
    layers = found["attention"]["layers"]
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
    axes = Axes(digits=2, marker=1.0, x_name=lambda x: f"{x:g}", x_ticks=range(1, len(layers) + 1))
    hint = "layer of the network; the dotted line at 1 is what looking everywhere alike would give"
    return Figure(
        "Looking at the picture",
        "weight on the picture, times its even share",
        hint,
        _drawn("Looking", series, axes),
        _legend(names),
    )


def _relevance(found: Mapping[str, Any], names: Sequence[str]) -> Figure | None:
    relevance = found["relevance"]
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
    hint = "image relevance of a response, 0 to 100; further right fits the picture better"
    return Figure(
        "Relevance of responses", "share of test responses", hint, _drawn("Relevance", series, axes), _legend(names)
    )


def _separability(found: Mapping[str, Any]) -> Figure | None:
    own = [row for row in found["separability"] if row["pairs"] != "external"]
    series = []
    for style, (side, name) in enumerate(zip(_SIDES, ("before training on them", "after"), strict=True)):
        points = []
        for row in own:
            metric = row[side]["auc"]
            title = f"pairs of {row['pairs']}, {name}: {fixed(metric['value'])}"
            points.append(Point(row["to"], metric["value"], metric["low"], metric["high"], title))
        series.append(Series(name, points, style))
    axes = Axes(digits=2, marker=0.5, at_most=1.0, x_ticks=[row["to"] for row in own])
    return Figure(
        "Chosen told from rejected",
        "chance that a chosen response is more probable than a rejected one",
        "iteration whose pairs they are; 0.5 is guessing",
        _drawn("Chosen told from rejected", series, axes),
        _legend([line.name for line in series]),
    )


def _attention_words(found: Mapping[str, Any]) -> str:
    """Say in words what the layers' change amounts to."""
    layers = [layer["beyond_sinks"] for layer in found["attention"]["layers"]]
    certain = [layer for layer in layers if layer["low"] > 0 or layer["high"] < 0]
    large = [layer for layer in certain if abs(layer["value"]) >= _NOTICEABLE]
    if not large:
        most = max((abs(layer["value"]) for layer in layers), default=0.0)
        return (
            "The model looks at the picture as much as before: no layer's weight on it changed by "
            f"{_NOTICEABLE} of its even share or more (the most is {fixed(most)}). The change lies elsewhere."
        )
    more = sum(layer["value"] > 0 for layer in large)
    return (
        f"Of {len(layers)} layers {more} look at the picture noticeably more than before and {len(large) - more} less; "
        f"the largest change is {signed(max((layer['value'] for layer in large), key=abs))} of the even share."
    )


def _separability_words(found: Mapping[str, Any]) -> str:
    first = found["separability"][0]
    before, after = (first[side]["preferred"]["value"] for side in _SIDES)
    text = (
        "Before training the base model itself found the chosen response more probable, a token, in "
        f"{percent(before)} of the first pairs; after training on them it does in {percent(after)}."
    )
    foreign = next((row for row in found["separability"] if row["pairs"] == "external"), None)
    if foreign is not None:
        own, other = (row["before"]["auc"]["value"] for row in (first, foreign))
        verb = "easier" if other > own else "harder"
        text += (
            f" The pairs from elsewhere are {verb} for it to tell apart (AUC {fixed(other)}, its own {fixed(own)}): "
            "pairs that it tells apart already have less to teach."
        )
    return text


def _layers(found: Mapping[str, Any]) -> Grid:
    rows = [
        Row(
            f"layer {number}",
            [
                (fixed(layer["mass"]["before"]), ""),
                (fixed(layer["mass"]["after"]), ""),
                *_change(layer["relative"]),
                *_change(layer["beyond_sinks"]),
            ],
        )
        for number, layer in enumerate(found["attention"]["layers"], start=1)
    ]
    columns = ["weight, base", "weight, after", "over even share, base", "change", "without sinks, base", "change"]
    return Grid("Attention to the picture, layer by layer, with 95 % intervals of the change", "Layer", columns, rows)


def _change(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    ends = f"{signed(found['low'])} to {signed(found['high'])}"
    return [(fixed(found["before"]), ""), (signed(found["value"]), ends)]


def _pairs(found: Mapping[str, Any]) -> Grid:
    def cell(metric: Mapping[str, Any]) -> tuple[str, str]:
        return fixed(metric["value"]), f"{fixed(metric['low'])} to {fixed(metric['high'])}"

    rows = []
    for row in found["separability"]:
        sides = [cell(row[side][name]) for name in ("preferred", "margin", "auc") for side in _SIDES]
        rows.append(Row(f"{row['pairs']}", [*sides, cell(row["implicit_reward"]["auc"])]))
    columns = [f"{name}, {side}" for name in ("prefers chosen", "margin, nats a token", "AUC") for side in _SIDES]
    note = (
        "Prefers chosen: share of pairs whose chosen response has the higher log-probability a token; AUC: chance that "
        "any chosen response has a higher one than any rejected; learned: AUC of what training added to it (DPO's "
        "implicit reward a token). Before: the policy that the pairs are trained from."
    )
    return Grid("How policies tell the sides of pairs apart", "Pairs of", [*columns, "AUC, learned"], rows, note)
