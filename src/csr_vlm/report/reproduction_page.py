"""Render one self-contained page with the paper's tables and the runs' own numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from csr_vlm.core.formatting import UNKNOWN, compact, fixed, plural
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
from csr_vlm.report.benchmark_panel import benchmark_headings
from csr_vlm.report.charts import Axes, Point, Series, chart
from csr_vlm.report.html import render_page
from csr_vlm.report.number_table import NumberTable, TableRow
from csr_vlm.report.panels import Figure, format_interval, iteration_label
from csr_vlm.report.provenance import provenance
from csr_vlm.report.radar import RadarSeries, Spoke, radar, radar_legend, values_by_column
from csr_vlm.store import files
from csr_vlm.store.run import Run

_RADAR_MODELS = ("base", "self-rewarding", "CSR (3)")
"""Published models in the radar chart; the table has all of them."""
_NO_CELL = (UNKNOWN, "")


def write_reproduction(runs: Sequence[Run], path: Path) -> Path:
    """Write the page from the runs' stored evaluations and return its path."""
    files.write_text(path, render(runs))
    return path


def render(runs: Sequence[Run]) -> str:
    """Return the page as HTML; the charts show the first run."""
    paper, numbers = published(), [collect_results(run) for run in runs]
    main = paper.main_table(runs[0].config.model.path)
    return render_page(
        "reproduction.html.j2",
        published=paper,
        summary=_summary(paper, numbers[0], main),
        main_tables=[_main_table(paper, table, numbers if table is main else []) for table in paper.main],
        radar=_radar(paper, main, numbers[0]),
        figures=_iteration_figures(paper, numbers[0]),
        tables=[
            _iteration_table(paper, numbers),
            _lambda_table(paper, numbers),
            _ablation_table(paper, numbers),
            _reward_table(numbers),
        ],
        apart=_apart_table(paper, numbers),
        quoted=_quoted_table(paper, numbers),
        protocols=_protocols(paper, numbers[0]),
        notes=[
            (benchmark.name, note)
            for benchmark in paper.benchmarks.values()
            for note in (benchmark.note, benchmark.apart, benchmark.differs and f"‡ {benchmark.differs}.")
            if note
        ],
        departures=[(str(item.run.root), departures(item.run)) for item in numbers],
        runs=[(item.run, provenance(item.run)) for item in numbers],
    )


def _summary(paper: Published, item: RunResults, main: PublishedTable) -> str:
    columns = [(key, *paper.benchmarks[key].shows) for key in main.columns]
    measured = [keys for keys in columns if any(key in item.result for key in keys)]
    comparable = [keys for keys in measured if all(item.result[key].same_data for key in keys if key in item.result)]
    num_benchmarks = plural(len(main.columns), "benchmark")
    if not measured:
        return f"{item.run.root.name} has not been evaluated on any of the paper's {num_benchmarks} yet."
    start = f"{item.run.root.name} has been evaluated on {len(measured)} of the paper's {num_benchmarks}"
    if not comparable:
        return f"{start}, using rendered scenes of the embedded world: these are not the paper's numbers."
    return f"{start}, {len(comparable)} of them on the same kind of data."


def _cell(obtained: RunResult | None) -> tuple[str, str]:
    if obtained is None:
        return _NO_CELL
    mark = "" if obtained.same_data else " †"
    return fixed(obtained.metric.value, 1) + mark, format_interval(obtained.metric, 1)


def _run_row(paper: Published, name: str, values: Mapping[str, RunResult], columns: Sequence[str]) -> TableRow:
    return TableRow(name, [_run_cell(paper, key, values) for key in columns], highlighted=True)


def _run_cell(paper: Published, key: str, values: Mapping[str, RunResult]) -> tuple[str, str]:
    """Return a run's number for a column; several numbers where the paper leaves open which one it means."""
    benchmark = paper.benchmarks[key]
    shown = [part for part in benchmark.shows if part in values]
    if shown:
        short = [paper.benchmarks[part].name.removeprefix(f"{benchmark.name} ") for part in shown]
        cells = [_run_cell(paper, part, values) for part in shown]
        return ", ".join(f"{name} {value}" for name, (value, _) in zip(short, cells, strict=True)), ""
    value, interval = _cell(values.get(key))
    return value + (" ‡" if benchmark.differs and key in values else ""), interval


def _published_cells(paper: Published, columns: Sequence[str], values: Sequence[float]) -> list[tuple[str, str]]:
    return [(f"{value:.{paper.benchmarks[key].digits}f}", "") for key, value in zip(columns, values, strict=True)]


def _main_table(paper: Published, table: PublishedTable, numbers: Sequence[RunResults]) -> NumberTable:
    rows = [TableRow(name, _published_cells(paper, table.columns, values)) for name, values in table.rows.items()]
    for item in numbers:
        for iteration in sorted({0, item.run.final} & item.by_iteration.keys()):
            name = f"{item.run.root.name}, {policy_name(iteration)}"
            rows.append(_run_row(paper, name, item.by_iteration[iteration], table.columns))
    return NumberTable(table.model, "Model", benchmark_headings(paper, table.columns), rows)


def _apart_table(paper: Published, numbers: Sequence[RunResults]) -> NumberTable | None:
    """Tabulate the runs' numbers that stand beside no published one; None without any."""
    columns = [
        key
        for key, benchmark in paper.benchmarks.items()
        if benchmark.apart and any(key in values for item in numbers for values in item.by_iteration.values())
    ]
    if not columns:
        return None
    rows = [
        _run_row(paper, f"{item.run.root.name}, {policy_name(iteration)}", values, columns)
        for item in numbers
        for iteration, values in item.by_iteration.items()
        if any(key in values for key in columns)
    ]
    note = "These are other data than the paper’s benchmarks of these names, so no published number stands beside them."
    return NumberTable("Measured apart", "Policy", benchmark_headings(paper, columns), rows, note)


def _quoted_table(paper: Published, numbers: Sequence[RunResults]) -> NumberTable:
    """Tabulate numbers from several sources, and the runs' own."""
    table = paper.hallucination
    rows = [
        TableRow(
            row.name,
            [
                (f"{row.values[key]:.{paper.benchmarks[key].digits}f}", "") if key in row.values else _NO_CELL
                for key in table.columns
            ],
            detail=f"{row.source}; {row.protocol}; {row.status}",
        )
        for row in table.rows
    ]
    for item in numbers:
        for iteration in sorted({0, item.run.final} & item.by_iteration.keys()):
            values = item.by_iteration[iteration]
            if any(key in values for key in table.columns):
                rows.append(_run_row(paper, f"{item.run.root.name}, {policy_name(iteration)}", values, table.columns))
    filled = [index for index in range(len(table.columns)) if any(row.cells[index] != _NO_CELL for row in rows)]
    rows = [replace(row, cells=[row.cells[index] for index in filled]) for row in rows]
    note = (
        f"The published rows are of {table.model}. Their protocols differ from one source to the next, and so do the "
        "judges of MMHal and Object HalBench. Unread: seen second-hand only."
    )
    headings = benchmark_headings(paper, [table.columns[index] for index in filled])
    return NumberTable("Hallucination benchmarks", "Model", headings, rows, note)


def _radar(paper: Published, main: PublishedTable, item: RunResults) -> Figure:
    spokes = [Spoke(paper.benchmarks[key].name, paper.benchmarks[key].better == "lower") for key in main.columns]
    series = [
        RadarSeries(f"paper: {name}", main.rows[name], style)
        for style, name in enumerate(_RADAR_MODELS)
        if name in main.rows
    ]
    known = {
        key: obtained.metric.value
        for key, obtained in item.result.items()
        if obtained.same_data and obtained.metric.value is not None and not paper.benchmarks[key].differs
    }
    if "pope_accuracy" in known:
        known["pope"] = known["pope_accuracy"]
    if any(key in known for key in main.columns):
        series.append(RadarSeries(item.run.root.name, values_by_column(main.columns, known), 3))
    text = f"{main.model}: " + ", ".join(line.name for line in series)
    hint = (
        "Each axis has its own scale, from the worst value on it (inside) to the best (at the rim); both ends are "
        "given under its name. Compare values along one axis only: a large gap in the chart can be a small one in "
        "points. Of a run, only numbers of the paper’s kind are drawn; on the axis POPE, its accuracy."
    )
    svg = radar(text, spokes, series)
    return Figure(f"{main.model}, all benchmarks", "farther out is better", hint, svg, radar_legend(series))


def _iteration_figures(paper: Published, item: RunResults) -> list[Figure]:
    """Draw CHAIR over the iterations, published and measured."""
    figures = []
    for key in ("chair_s", "chair_i"):
        column = paper.iterations.columns.index(key)
        published_points = [
            Point(iteration, values[column], title=f"paper, {policy_name(iteration)}: {values[column]:g}")
            for iteration, values in paper.iterations.rows.items()
        ]
        run_points = []
        for iteration, values_by_key in item.by_iteration.items():
            if key in values_by_key and values_by_key[key].metric.value is not None:
                metric = values_by_key[key].metric
                title = f"this run, {policy_name(iteration)}: {fixed(metric.value, 1)}"
                run_points.append(Point(iteration, metric.value or 0.0, metric.low, metric.high, title))
        series = [Series("paper, COCO", published_points), Series("this run", run_points, 1)]
        axes = Axes(from_zero=True, digits=1, format_x=iteration_label, x_ticks=list(paper.iterations.rows))
        name = paper.benchmarks[key].name
        text = "; ".join(point.title for line in series for point in line.points)
        rendered = any(key in values and not values[key].same_data for values in item.by_iteration.values())
        run_name = f"{item.run.root.name}{', rendered scenes' if rendered else ''}"
        legend = [(0, f"paper, {paper.iterations.model}"), *([(1, run_name)] if run_points else [])]
        figures.append(Figure(name, "percent, lower is better", "", chart(f"{name}: {text}", series, axes), legend))
    return figures


def _iteration_table(paper: Published, numbers: Sequence[RunResults]) -> NumberTable:
    table = paper.iterations
    rows = [
        TableRow(f"paper, {policy_name(iteration)}", _published_cells(paper, table.columns, values))
        for iteration, values in table.rows.items()
    ]
    for item in numbers:
        for iteration in sorted(item.by_iteration):
            name = f"{item.run.root.name}, {policy_name(iteration)}"
            rows.append(_run_row(paper, name, item.by_iteration[iteration], table.columns))
    note = f"The paper’s model is {table.model}."
    return NumberTable("Results by iteration", "Policy", benchmark_headings(paper, table.columns), rows, note)


def _lambda_table(paper: Published, numbers: Sequence[RunResults]) -> NumberTable:
    table = paper.lambdas
    rows = []
    for value in sorted({*table.rows, *(item.run.config.method.lambda_ for item in numbers)}):
        if value in table.rows:
            rows.append(TableRow(f"paper, λ = {value:g}", _published_cells(paper, table.columns, table.rows[value])))
        rows += [
            _run_row(paper, f"{item.run.root.name}, λ = {value:g}", item.result, table.columns)
            for item in with_lambda(numbers, value)
        ]
    note = "λ = 0 uses the model’s own probability only, λ = 1 image relevance only (eq. 4)."
    return NumberTable("Sensitivity to λ", "λ", benchmark_headings(paper, table.columns), rows, note)


def _ablation_table(paper: Published, numbers: Sequence[RunResults]) -> NumberTable:
    """Tabulate the published averages, and CHAIR of runs with the same part of the reward."""
    chair = ("chair_s", "chair_i")
    rows = [
        TableRow(f"paper, {name}", [*((f"{value:.2f}", "") for value in values), _NO_CELL, _NO_CELL])
        for name, values in paper.ablation.rows.items()
    ]
    for name, lambda_ in LAMBDA_OF_ABLATION.items():
        for item in with_lambda(numbers, lambda_):
            cells = [_cell(item.result.get(key)) for key in chair]
            rows.append(TableRow(f"{item.run.root.name}, {name}", [_NO_CELL, _NO_CELL, *cells], highlighted=True))
    columns = [f"average, {size}" for size in paper.ablation.columns] + benchmark_headings(paper, chair)
    note = (
        "The paper’s tables do not define its average, so the runs have none; CHAIR is shown for runs with one part "
        "of the reward."
    )
    return NumberTable("Ablation of the reward", "Reward", columns, rows, note)


def _reward_table(numbers: Sequence[RunResults]) -> NumberTable:
    columns = ["chosen", "rejected", "average"]
    rows = [
        TableRow(
            f"{item.run.root.name}, {policy_name(iteration)}",
            [(compact(rewards[column]), "") for column in columns],
            highlighted=True,
        )
        for item in numbers
        for iteration, rewards in item.rewards.items()
    ]
    note = "Mean R(y) of the pairs. The unit depends on the run’s preset."
    return NumberTable("Rewards by iteration", "Pairs of", columns, rows, note)


def _protocols(paper: Published, item: RunResults) -> list[tuple[str, list[Any]]]:
    """Return the protocol fields, published and measured, of each evaluated benchmark."""
    return [
        (paper.benchmarks[key].name, protocol_fields(paper.benchmarks[key], obtained))
        for key, obtained in item.result.items()
    ]
