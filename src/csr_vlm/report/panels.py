"""Build the report's headline numbers, charts and tables of metrics, pairs and training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from statistics import fmean
from typing import Any

from markupsafe import Markup

from csr_vlm.core.formatting import compact, count, fixed, interval, percent, relative_change, scientific, signed
from csr_vlm.evaluation.compare import policy_name
from csr_vlm.evaluation.metrics import MetricSpec, metric_spec, sort_metrics
from csr_vlm.evaluation.statistics import Metric
from csr_vlm.report.charts import Axes, Point, Series, chart, smoothed
from csr_vlm.report.evaluations import Evaluation, intervals_overlap
from csr_vlm.store.run import Run

Legend = list[tuple[int, str]]
"""(line style, name) of each series."""


@dataclass(frozen=True)
class Tile:
    """Represent a headline number before and after training."""

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
    """Represent a chart with its caption; the legend is empty for a single series."""

    label: str
    meaning: str
    hint: str
    svg: Markup
    legend: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True)
class MetricTable:
    """Represent the metrics of several policies."""

    columns: Sequence[str]
    rows: Sequence[tuple[MetricSpec, Sequence[tuple[str, str]], int]]
    """(metric, (value, interval) per policy, number of prompts)."""


def iteration_label(number: float) -> str:
    """Return the label of an iteration on a horizontal axis."""
    return "base" if number == 0 else f"{number:g}"


def format_interval(metric: Metric, digits: int = 3) -> str:
    """Format a 95 % interval; empty if there is none."""
    return interval(metric.low, metric.high, digits)


def _spec_interval(spec: MetricSpec, metric: Metric) -> str:
    return interval(metric.low, metric.high, spec.digits)


def headline_tiles(evaluation: Evaluation) -> list[Tile]:
    """Build a tile for each headline metric."""
    return [_tile(spec, evaluation) for spec in evaluation.headline]


def _tile(spec: MetricSpec, evaluation: Evaluation) -> Tile:
    before, after = evaluation.endpoints(spec.key)
    if evaluation.first == evaluation.last:
        return Tile(spec.label, spec.meaning, "", spec.format(after.value), "", _spec_interval(spec, after))
    tone, change = "none", ""
    if before.value is not None and after.value is not None:
        decline = spec.decline(before.value, after.value)
        if not intervals_overlap(before, after):
            tone = "worse" if decline > 0 else "better" if decline < 0 else "none"
        relative = relative_change(before.value, after.value) if spec.better == "lower" else None
        change = relative or signed(after.value - before.value, spec.digits or 0)
    return Tile(
        spec.label,
        spec.meaning,
        spec.format(before.value),
        spec.format(after.value),
        _spec_interval(spec, before),
        _spec_interval(spec, after),
        change,
        tone,
    )


def pair_tiles(results: Mapping[int, Mapping[str, Any]]) -> list[Tile]:
    """Build the headline of a run without evaluation: the pairs of the first and the last iteration."""
    if not results:
        return []
    first, last = results[min(results)], results[max(results)]
    numbers = (
        ("pairs", "Pairs", "preference pairs", count),
        ("margin", "Margin", "mean reward of chosen minus rejected", compact),
        ("chosen_longer", "Chosen longer", "pairs whose chosen response has more sentences", percent),
    )
    return [
        Tile(label, meaning, write(first.get(key)) if len(results) > 1 else "", write(last.get(key)))
        for key, label, meaning, write in numbers
    ]


def metric_figures(evaluation: Evaluation) -> list[Figure]:
    """Draw one chart per metric over the iterations."""
    figures = []
    for spec in evaluation.charted:
        description, series, axes = metric_chart(spec, evaluation)
        hint = spec.hint if spec.axis_from_zero else f"{spec.hint}; the axis does not start at 0"
        figures.append(Figure(spec.label, spec.meaning, hint, chart(description, [series], axes)))
    return figures


def metric_chart(spec: MetricSpec, evaluation: Evaluation) -> tuple[str, Series, Axes]:
    """Return the description, the line and the axes of a metric's chart over the iterations."""
    points = []
    for number in evaluation.metrics:
        metric = evaluation.metric(number, spec.key)
        if metric.value is not None:
            title = f"{policy_name(number)}: {spec.format(metric.value)}"
            if metric.low is not None:
                title += f" (95 % interval {_spec_interval(spec, metric)}, n = {metric.n})"
            points.append(Point(number, metric.value, metric.low, metric.high, title))
    axes = Axes(
        from_zero=spec.axis_from_zero,
        upper_bound=spec.upper_bound,
        digits=spec.digits if spec.digits is not None else 3,
        format_x=iteration_label,
        x_ticks=sorted(evaluation.metrics),
    )
    return f"{spec.label}: " + "; ".join(point.title for point in points), Series(spec.label, points), axes


def metric_table(evaluation: Evaluation) -> MetricTable:
    """Tabulate every metric of every evaluated policy."""
    numbers = sorted(evaluation.metrics)
    rows = []
    for key in sort_metrics(evaluation.keys):
        spec = metric_spec(key, evaluation.name)
        metrics = [evaluation.metric(number, key) for number in numbers]
        cells = [(spec.format(metric.value), _spec_interval(spec, metric)) for metric in metrics]
        rows.append((spec, cells, max(metric.n for metric in metrics)))
    return MetricTable([policy_name(number) for number in numbers], rows)


def pair_results(run: Run) -> dict[int, dict[str, Any]]:
    """Read the results of the pairs stage of each iteration, with those of its generation stage."""
    return {
        number: run.result(number, "pairs")
        | ({"generate": run.result(number, "generate")} if run.is_done(number, "generate") else {})
        for number in range(1, run.config.iterations + 1)
        if run.is_done(number, "pairs")
    }


def pair_figures(results: Mapping[int, Mapping[str, Any]]) -> list[Figure]:
    """Draw reward and length of chosen and rejected responses, and how often the chosen one is longer."""
    if not results:
        return []
    sides = ("chosen", "rejected")
    figures = []
    for key, label, meaning, from_zero in (
        ("reward", "Reward", "mean R(y)", False),
        ("sentences", "Length", "mean number of sentences", True),
    ):
        series = [Series(side, _pair_points(results, f"{side}_{key}", side), style) for style, side in enumerate(sides)]
        axes = Axes(from_zero=from_zero, digits=2, format_x=iteration_label, x_ticks=sorted(results))
        svg = chart(_description(label, series), series, axes)
        figures.append(Figure(label, meaning, "", svg, list(enumerate(sides))))
    longer = [Series("chosen is longer", _pair_points(results, "chosen_longer", "chosen is longer"))]
    axes = Axes(from_zero=True, upper_bound=1.0, digits=2, format_x=iteration_label, x_ticks=sorted(results))
    svg = chart(_description("Chosen is longer", longer), longer, axes)
    figures.append(Figure("Chosen is longer", "share of pairs", "equal lengths do not count as longer", svg))
    return figures


def _pair_points(results: Mapping[int, Mapping[str, Any]], key: str, name: str) -> list[Point]:
    return [
        Point(number, result[key], title=f"iteration {number}, {name}: {compact(result[key])}")
        for number, result in results.items()
        if result.get(key) is not None
    ]


def _description(label: str, series: Sequence[Series]) -> str:
    return f"{label}: " + "; ".join(point.title for line in series for point in line.points)


def training_results(run: Run) -> dict[int, dict[str, Any]]:
    """Read the results of each training, with means over the last tenth of the logged steps."""
    results = {}
    for number in range(1, run.config.iterations + 1):
        if run.is_done(number, "train"):
            result = run.result(number, "train")
            logged = [entry for entry in result.get("log", []) if isinstance(entry, dict)]
            end = logged[-max(len(logged) // 10, 1) :]
            results[number] = result | {"log": logged, "end": {key: _mean(end, key) for key, *_ in _CURVES}}
    return results


_CURVES = (
    ("loss", "Loss", ""),
    ("rewards/accuracies", "Accuracy", "pairs with a higher implicit reward for chosen"),
    ("rewards/margins", "Margin", "implicit reward of chosen minus rejected"),
)
"""(key in TRL's log, label, meaning)."""


def _mean(entries: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [float(entry[key]) for entry in entries if entry.get(key) is not None]
    return fmean(values) if values else None


def _loss_meaning(trl: Mapping[str, Any]) -> tuple[str, bool]:
    """Say what the logged loss is, and whether it is DPO's sigmoid loss alone, which is ln 2 without a preference."""
    kinds = trl.get("loss_type", "sigmoid")
    kinds = list(kinds) if isinstance(kinds, list | tuple) else [kinds]
    weights = trl.get("loss_weights") or [1.0] * len(kinds)
    if kinds == ["sigmoid"] and weights == [1.0] and not trl.get("label_smoothing"):
        return "training loss; dotted line: ln 2, the DPO loss without a preference", True
    parts = " + ".join(
        f"{kind}" if weight == 1 else f"{weight:g} {kind}" for kind, weight in zip(kinds, weights, strict=False)
    )
    only = "; only the sigmoid part is ln 2 without a preference" if "sigmoid" in kinds else ""
    return f"training loss: {parts}{only}", False


def training_figures(results: Mapping[int, Mapping[str, Any]], trl: Mapping[str, Any]) -> list[Figure]:
    """Draw the trainer's log over the optimizer steps, one line per iteration.

    Args:
        results: Results of :func:`training_results`.
        trl: Arguments of TRL's trainer, which say what the loss is.
    """
    figures = []
    loss_meaning, is_sigmoid = _loss_meaning(trl)
    legend = [(number - 1, f"iteration {number}") for number in results] if len(results) > 1 else []
    for key, label, meaning in _CURVES:
        series = [
            Series(f"iteration {number}", _curve(result["log"], key), number - 1) for number, result in results.items()
        ]
        axes = Axes(
            from_zero=key == "rewards/accuracies",
            upper_bound=1.0 if key == "rewards/accuracies" else None,
            horizontal_line=log(2) if key == "loss" and is_sigmoid else None,
            label_points=False,
        )
        ends = "; ".join(f"iteration {n} ends at {fixed(result['end'][key])}" for n, result in results.items())
        figure = Figure(label, meaning or loss_meaning, "", chart(f"{label} over steps: {ends}", series, axes), legend)
        if figure.svg:
            figures.append(figure)
    return figures


def _curve(entries: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    points = [
        Point(float(entry.get("step", index)), float(entry[key]))
        for index, entry in enumerate(entries, start=1)
        if entry.get(key) is not None
    ]
    return smoothed(points)


def reference_source(result: Mapping[str, Any]) -> str:
    """Describe where the reference log-probabilities came from and how far they were from a teacher-forced pass."""
    source = {"ledger": "from the ledger", "model": "recomputed"}.get(result.get("reference", ""), "unknown")
    return f"{source}; largest difference {scientific(result.get('reference_difference'))} nats"
