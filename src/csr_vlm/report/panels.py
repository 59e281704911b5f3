"""The report's figures and tables: what stands between the verdict and the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from statistics import fmean
from typing import Any

from markupsafe import Markup

from csr_vlm.core.formatting import compact, count, fixed, percent, relative_change, scientific, signed
from csr_vlm.evaluation.compare import policy_name
from csr_vlm.evaluation.statistics import Metric
from csr_vlm.report.charts import Axes, Point, Series, chart, smoothed
from csr_vlm.report.measures import MEASURES, Evaluation, Measure, overlap
from csr_vlm.store.run import Run


@dataclass(frozen=True)
class Tile:
    """A headline number, before and after."""

    label: str
    meaning: str
    before: str
    after: str
    before_interval: str = ""
    after_interval: str = ""
    change: str = ""
    tone: str = "none"


@dataclass(frozen=True)
class Figure:
    label: str
    meaning: str
    hint: str
    svg: Markup
    legend: Sequence[tuple[int, str]] = ()
    """(style, name) of each series where there are several."""


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def iteration_name(number: float) -> str:
    return "base" if number == 0 else f"{number:g}"


def interval(metric: Metric, digits: int) -> str:
    """Write a 95 % interval; empty where there is none."""
    return "" if metric.low is None else f"{fixed(metric.low, digits)} to {fixed(metric.high, digits)}"


def headline_tiles(evaluation: Evaluation) -> list[Tile]:
    return [_tile(measure, evaluation) for measure in evaluation.headline]


def _tile(measure: Measure, evaluation: Evaluation) -> Tile:
    before, after = (evaluation.metric(n, measure.key) for n in (evaluation.first, evaluation.last))
    if evaluation.first == evaluation.last:
        value, bounds = fixed(after.value, measure.digits), interval(after, measure.digits)
        return Tile(measure.label, measure.meaning, "", value, "", bounds)
    tone, change = "none", ""
    if before.value is not None and after.value is not None:
        worse = measure.worse_by(before.value, after.value)
        if not overlap(before, after):
            tone = "worse" if worse > 0 else "better" if worse < 0 else "none"
        share = relative_change(before.value, after.value) if measure.better == "lower" else None
        change = share or signed(after.value - before.value, measure.digits)
    return Tile(
        measure.label,
        measure.meaning,
        fixed(before.value, measure.digits),
        fixed(after.value, measure.digits),
        interval(before, measure.digits),
        interval(after, measure.digits),
        change,
        tone,
    )


def pair_tiles(results: Mapping[int, Mapping[str, Any]]) -> list[Tile]:
    """Headline numbers of a run that evaluates nothing: first against last pairs."""
    if not results:
        return []
    first, last = results[min(results)], results[max(results)]
    several = len(results) > 1
    shown = (
        ("pairs", "Pairs", "prompts with a preference", count),
        ("margin", "Margin", "mean reward of chosen less rejected", compact),
        ("chosen_longer", "Chosen longer", "pairs whose chosen response has more sentences", percent),
    )
    return [
        Tile(label, meaning, write(first.get(key)) if several else "", write(last.get(key)))
        for key, label, meaning, write in shown
    ]


def metric_figures(evaluation: Evaluation) -> list[Figure]:
    """One small chart a measure, iteration by iteration."""
    return [_metric_figure(measure, evaluation) for measure in evaluation.plotted]


def _metric_figure(measure: Measure, evaluation: Evaluation) -> Figure:
    points = []
    for number in evaluation.measured:
        metric = evaluation.metric(number, measure.key)
        if metric.value is not None:
            title = f"{policy_name(number)}: {fixed(metric.value, measure.digits)}"
            if metric.low is not None:
                title += f" (95 % interval {interval(metric, measure.digits)}, n = {metric.n})"
            points.append(Point(number, metric.value, metric.low, metric.high, title))
    axes = Axes(
        from_zero=measure.from_zero,
        at_most=measure.at_most,
        digits=measure.digits,
        x_name=iteration_name,
        x_ticks=sorted(evaluation.measured),
    )
    description = f"{measure.label}: " + "; ".join(point.title for point in points)
    hint = measure.hint if measure.from_zero else f"{measure.hint}; the axis does not start at 0"
    return Figure(measure.label, measure.meaning, hint, chart(description, [Series(measure.label, points)], axes))


def metric_table(evaluation: Evaluation) -> Table:
    """Every measure of every evaluated policy; cells are (value, interval)."""
    numbers = sorted(evaluation.measured)
    present = {key for metrics in evaluation.measured.values() for key in metrics}
    unknown = sorted(present - {measure.key for measure in MEASURES})
    measures = [m for m in MEASURES if m.key in present] + [Measure(key, key, "", "neither") for key in unknown]
    rows = []
    for measure in measures:
        found = [evaluation.metric(number, measure.key) for number in numbers]
        cells = [(fixed(m.value, measure.digits), interval(m, measure.digits)) for m in found]
        rows.append((measure, cells, max(m.n for m in found)))
    return Table([policy_name(number) for number in numbers], rows)


def pair_results(run: Run) -> dict[int, dict[str, Any]]:
    """What the pair and generation stages of each iteration reported."""
    return {
        number: run.result(number, "pairs")
        | ({"generate": run.result(number, "generate")} if run.is_done(number, "generate") else {})
        for number in range(1, run.config.iterations + 1)
        if run.is_done(number, "pairs")
    }


def pair_figures(results: Mapping[int, Mapping[str, Any]]) -> list[Figure]:
    """Chosen against rejected: reward and length; and how often the chosen is the longer."""
    if not results:
        return []
    sides = ("chosen", "rejected")
    figures = []
    for key, label, meaning, zero in (
        ("reward", "Reward", "mean R(y)", False),
        ("sentences", "Sentences", "mean number in a response", True),
    ):
        series = [Series(side, _points(results, f"{side}_{key}", side), style) for style, side in enumerate(sides)]
        axes = Axes(from_zero=zero, digits=2, x_name=iteration_name, x_ticks=sorted(results))
        figures.append(
            Figure(label, meaning, "", chart(_describe(label, series), series, axes), list(enumerate(sides)))
        )
    longer = [Series("chosen is longer", _points(results, "chosen_longer", "chosen is longer"))]
    axes = Axes(from_zero=True, at_most=1.0, digits=2, x_name=iteration_name, x_ticks=sorted(results))
    svg = chart(_describe("Chosen is longer", longer), longer, axes)
    figures.append(Figure("Chosen is longer", "share of pairs", "equal lengths count as not longer", svg))
    return figures


def _points(results: Mapping[int, Mapping[str, Any]], key: str, name: str) -> list[Point]:
    return [
        Point(number, result[key], title=f"iteration {number}, {name}: {compact(result[key])}")
        for number, result in results.items()
        if result.get(key) is not None
    ]


def _describe(label: str, series: Sequence[Series]) -> str:
    return f"{label}: " + "; ".join(point.title for item in series for point in item.points)


def training_results(run: Run) -> dict[int, dict[str, Any]]:
    """What each iteration's training reported, with the means over the last tenth of its steps."""
    found = {}
    for number in range(1, run.config.iterations + 1):
        if run.is_done(number, "train"):
            result = run.result(number, "train")
            logged = [entry for entry in result.get("log", []) if isinstance(entry, dict)]
            end = logged[-max(len(logged) // 10, 1) :]
            found[number] = result | {"log": logged, "end": {key: _mean(end, key) for key, *_ in _CURVES}}
    return found


_CURVES = (
    ("loss", "Loss", "of TRL; the line is ln 2, where DPO knows no preference"),
    ("rewards/accuracies", "Accuracy", "pairs whose chosen is preferred"),
    ("rewards/margins", "Margin", "implicit reward of chosen less rejected"),
)


def _mean(entries: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [float(entry[key]) for entry in entries if entry.get(key) is not None]
    return fmean(values) if values else None


def training_figures(results: Mapping[int, Mapping[str, Any]]) -> list[Figure]:
    """The trainer's log over steps, one line an iteration."""
    figures = []
    legend = [(number - 1, f"iteration {number}") for number in results] if len(results) > 1 else []
    for key, label, meaning in _CURVES:
        series = [
            Series(f"iteration {number}", _curve(result["log"], key), number - 1) for number, result in results.items()
        ]
        axes = Axes(
            from_zero=key == "rewards/accuracies",
            at_most=1.0 if key == "rewards/accuracies" else None,
            marker=log(2) if key == "loss" else None,
            label_points=False,
        )
        ends = "; ".join(f"iteration {n} ends at {fixed(result['end'][key])}" for n, result in results.items())
        figure = Figure(label, meaning, "", chart(f"{label} over steps: {ends}", series, axes), legend)
        if figure.svg:
            figures.append(figure)
    return figures


def _curve(entries: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    points = [
        Point(float(entry.get("step", place)), float(entry[key]))
        for place, entry in enumerate(entries, start=1)
        if entry.get(key) is not None
    ]
    return smoothed(points)


def reference_words(result: Mapping[str, Any]) -> str:
    """Say where the reference log-probabilities came from and how they compared."""
    source = {"ledger": "ledger", "model": "computed again"}.get(result.get("reference", ""), "unknown")
    return f"{source}, {scientific(result.get('reference_difference'))} nats apart"
