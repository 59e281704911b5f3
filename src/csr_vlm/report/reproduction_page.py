"""One self-contained page: the paper's tables with own numbers beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csr_vlm.core.formatting import compact, fixed, plural
from csr_vlm.evaluation.compare import policy_name
from csr_vlm.evaluation.reproduction import (
    LAMBDA_OF_ABLATION,
    Published,
    PublishedTable,
    RunResult,
    RunResults,
    collect_results,
    departures,
    protocol_fields,
    published,
    with_lambda,
)
from csr_vlm.report.charts import Axes, Point, Series, chart
from csr_vlm.report.grid import Grid, Row
from csr_vlm.report.html import page
from csr_vlm.report.panels import Figure, interval, iteration_name
from csr_vlm.report.provenance import provenance
from csr_vlm.report.radar import Shape, Spoke, legend_of, radar, values_in
from csr_vlm.store import files
from csr_vlm.store.run import Run

_COMPARED = ("base", "self-rewarding", "CSR (3)")
"""The published models that the radar shows; all are in the table."""


def write_reproduction(runs: Sequence[Run], path: Path) -> Path:
    """Write the page from what the runs have stored."""
    files.write_text(path, render(runs))
    return path


def render(runs: Sequence[Run]) -> str:
    """Return the page as HTML; the first run is the one that the charts show."""
    tables, found = published(), [collect_results(run) for run in runs]
    main = tables.main_table(runs[0].config.model.path)
    return page(
        "reproduction.html.j2",
        published=tables,
        summary=_summary(found[0], main),
        main_grids=[_main_grid(tables, table, found if table is main else []) for table in tables.main],
        radar=_radar(tables, main, found[0]),
        figures=_iteration_figures(tables, found[0]),
        grids=[_iterations(tables, found), _lambdas(tables, found), _ablation(tables, found), _rewards(found)],
        protocols=_protocols(tables, found[0]),
        notes=[(b.name, b.note) for b in tables.benchmarks.values() if b.note],
        departures=[(str(item.run.root), departures(item.run)) for item in found],
        runs=[(item.run, provenance(item.run)) for item in found],
    )


def _summary(item: RunResults, main: PublishedTable) -> str:
    measured = [key for key in main.columns if key in item.result]
    comparable = [key for key in measured if item.result[key].same_data]
    if not measured:
        return f"{item.run.root} has measured none of the paper's {len(main.columns)} benchmarks yet."
    start = f"Of the paper's {plural(len(main.columns), 'benchmark')} {item.run.root} has {len(measured)}"
    if not comparable:
        return f"{start}, on drawn scenes of the embedded world: they show the method at work, not the paper's numbers."
    return f"{start}, {len(comparable)} of them on the paper's kind of data."


def _cell(obtained: RunResult | None) -> tuple[str, str]:
    if obtained is None:
        return "–", ""
    mark = "" if obtained.same_data else " †"
    return fixed(obtained.metric.value, 1) + mark, interval(obtained.metric, 1)


def _names(tables: Published, columns: Sequence[str]) -> list[str]:
    return [
        f"{tables.benchmarks[key].name} {'↓' if tables.benchmarks[key].better == 'lower' else '↑'}" for key in columns
    ]


def _written(tables: Published, columns: Sequence[str], values: Sequence[float]) -> list[tuple[str, str]]:
    return [(f"{value:.{tables.benchmarks[key].digits}f}", "") for key, value in zip(columns, values, strict=True)]


def _main_grid(tables: Published, table: PublishedTable, found: Sequence[RunResults]) -> Grid:
    rows = [Row(name, _written(tables, table.columns, values)) for name, values in table.rows.items()]
    for item in found:
        for number in sorted({0, item.run.final} & item.by_iteration.keys()):
            mine = item.by_iteration[number]
            label = f"{item.run.root.name}, {policy_name(number)}"
            rows.append(Row(label, [_cell(mine.get(key)) for key in table.columns], own=True))
    return Grid(table.model, "Model", _names(tables, table.columns), rows)


def _radar(tables: Published, main: PublishedTable, item: RunResults) -> Figure:
    spokes = [Spoke(tables.benchmarks[key].name, tables.benchmarks[key].better == "lower") for key in main.columns]
    shapes = [
        Shape(f"paper: {name}", main.rows[name], style) for style, name in enumerate(_COMPARED) if name in main.rows
    ]
    own = {key: value.metric.value for key, value in item.result.items() if value.same_data and value.metric.value}
    if any(key in own for key in main.columns):
        shapes.append(Shape(item.run.root.name, values_in(main.columns, {k: v for k, v in own.items() if v}), 3))
    text = f"{main.model}: " + ", ".join(shape.name for shape in shapes)
    hint = (
        "Each spoke has its own scale, from the worst value shown on it (inside) to the best (at the rim); both stand "
        "under its name. Only compare shapes along one spoke: a large gap in the picture can be a small one in points."
    )
    return Figure(
        f"{main.model} on every benchmark",
        "further out is better",
        hint,
        radar(text, spokes, shapes),
        legend_of(shapes),
    )


def _iteration_figures(tables: Published, item: RunResults) -> list[Figure]:
    """CHAIR over iterations: the paper's line and the run's own."""
    figures = []
    for key in ("chair_s", "chair_i"):
        column = tables.iterations.columns.index(key)
        theirs = [
            Point(number, values[column], title=f"paper, {policy_name(number)}: {values[column]:g}")
            for number, values in tables.iterations.rows.items()
        ]
        mine = []
        for number, found in item.by_iteration.items():
            if key in found and found[key].metric.value is not None:
                metric = found[key].metric
                title = f"this run, {policy_name(number)}: {fixed(metric.value, 1)}"
                mine.append(Point(number, metric.value or 0.0, metric.low, metric.high, title))
        series = [Series("paper, COCO", theirs), Series("this run", mine, 1)]
        axes = Axes(from_zero=True, digits=1, x_name=iteration_name, x_ticks=list(tables.iterations.rows))
        name = tables.benchmarks[key].name
        text = "; ".join(point.title for line in series for point in line.points)
        drawn = any(key in found and not found[key].same_data for found in item.by_iteration.values())
        own = f"{item.run.root.name}{', drawn scenes' if drawn else ''}"
        legend = [(0, f"paper, {tables.iterations.model}"), *([(1, own)] if mine else [])]
        figures.append(Figure(name, "per cent, lower is better", "", chart(f"{name}: {text}", series, axes), legend))
    return figures


def _iterations(tables: Published, found: Sequence[RunResults]) -> Grid:
    table = tables.iterations
    rows = [
        Row(f"paper, {policy_name(number)}", _written(tables, table.columns, values))
        for number, values in table.rows.items()
    ]
    for item in found:
        for number in sorted(item.by_iteration):
            mine = item.by_iteration[number]
            cells = [_cell(mine.get(key)) for key in table.columns]
            rows.append(Row(f"{item.run.root.name}, {policy_name(number)}", cells, own=True))
    return Grid(
        "Iteration by iteration", "Policy", _names(tables, table.columns), rows, f"The paper's model is {table.model}."
    )


def _lambdas(tables: Published, found: Sequence[RunResults]) -> Grid:
    table = tables.lambdas
    rows = []
    weights = sorted({*table.rows, *(item.run.config.method.lambda_ for item in found)})
    for weight in weights:
        if weight in table.rows:
            rows.append(Row(f"paper, λ = {weight:g}", _written(tables, table.columns, table.rows[weight])))
        for item in with_lambda(found, weight):
            cells = [_cell(item.result.get(key)) for key in table.columns]
            rows.append(Row(f"{item.run.root.name}, λ = {weight:g}", cells, own=True))
    return Grid(
        "The weight of image relevance",
        "λ",
        _names(tables, table.columns),
        rows,
        "λ = 0 is the model's own probability alone, λ = 1 image relevance alone (eq. 4).",
    )


def _ablation(tables: Published, found: Sequence[RunResults]) -> Grid:
    """The published averages, and CHAIR of runs with the same half of the reward."""
    rows = [
        Row(f"paper, {name}", [*((f"{value:.2f}", "") for value in values), ("–", ""), ("–", "")])
        for name, values in tables.ablation.rows.items()
    ]
    for name, weight in LAMBDA_OF_ABLATION.items():
        for item in with_lambda(found, weight):
            cells = [_cell(item.result.get(key)) for key in ("chair_s", "chair_i")]
            rows.append(Row(f"{item.run.root.name}, {name}", [("–", ""), ("–", ""), *cells], own=True))
    columns = [f"average, {size}" for size in tables.ablation.columns] + _names(tables, ("chair_s", "chair_i"))
    note = (
        "How the paper's average is formed cannot be told from its tables, so no own average stands beside it; "
        "runs with one half of the reward show their CHAIR instead."
    )
    return Grid("One half of the reward", "Reward", columns, rows, note)


def _rewards(found: Sequence[RunResults]) -> Grid:
    rows = [
        Row(
            f"{item.run.root.name}, iteration {number}",
            [(compact(values[side]), "") for side in ("chosen", "rejected", "average")],
            own=True,
        )
        for item in found
        for number, values in item.rewards.items()
    ]
    note = "Mean R(y) of the pairs, in the units of the run's own reward, which differ between presets."
    return Grid("Rewards over iterations", "Pairs of", ["chosen", "rejected", "average"], rows, note)


def _protocols(tables: Published, item: RunResults) -> list[tuple[str, list[Any]]]:
    """For each measured benchmark, the protocols side by side."""
    return [
        (tables.benchmarks[key].name, protocol_fields(tables.benchmarks[key], obtained))
        for key, obtained in item.result.items()
    ]
