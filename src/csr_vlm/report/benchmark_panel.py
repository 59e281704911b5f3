"""Build the report's benchmarks: a table, and a radar chart of three or more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from csr_vlm.core.formatting import UNKNOWN, fixed
from csr_vlm.evaluation.compare import policy_name
from csr_vlm.evaluation.reproduction import Published, RunResults, collect_results, published
from csr_vlm.report.number_table import NumberTable, TableRow
from csr_vlm.report.panels import Figure, format_interval
from csr_vlm.report.radar import RadarSeries, Spoke, radar, radar_legend
from csr_vlm.store.run import Run


@dataclass(frozen=True)
class BenchmarkPanel:
    """Hold the benchmarks of a run; the radar chart is None for fewer than three."""

    table: NumberTable
    figure: Figure | None


def benchmark_panel(run: Run) -> BenchmarkPanel | None:
    """Gather the paper's benchmarks that the run has measured; None if there are none."""
    paper, numbers = published(), collect_results(run)
    keys = [
        key
        for key in paper.benchmarks
        if any(key in values and values[key].same_data for values in numbers.by_iteration.values())
    ]
    if not keys:
        return None
    return BenchmarkPanel(_table(paper, numbers, keys), _figure(paper, numbers, keys) if len(keys) > 2 else None)


def benchmark_headings(paper: Published, keys: Sequence[str]) -> list[str]:
    """Return the name of each benchmark with an arrow in the direction of improvement."""
    return [f"{paper.benchmarks[key].name} {'↓' if paper.benchmarks[key].better == 'lower' else '↑'}" for key in keys]


def _table(paper: Published, numbers: RunResults, keys: Sequence[str]) -> NumberTable:
    rows = []
    for iteration, values in numbers.by_iteration.items():
        cells = [
            (fixed(values[key].metric.value, 1), format_interval(values[key].metric, 1))
            if key in values
            else (UNKNOWN, "")
            for key in keys
        ]
        if any(key in values for key in keys):
            rows.append(TableRow(policy_name(iteration), cells))
    note = "Same units as the paper’s tables. Run csr reproduce to compare with the published numbers."
    title = "Benchmarks, with 95 % intervals where available"
    return NumberTable(title, "Policy", benchmark_headings(paper, keys), rows, note)


def _figure(paper: Published, numbers: RunResults, keys: Sequence[str]) -> Figure:
    main = paper.main_table(numbers.run.config.model.path)
    column = {key: index for index, key in enumerate(main.columns)}
    spokes = [
        Spoke(
            paper.benchmarks[key].name,
            paper.benchmarks[key].better == "lower",
            [values[column[key]] for values in main.rows.values()]
            if key in column and not paper.benchmarks[key].differs
            else (),
        )
        for key in keys
    ]
    series = [
        RadarSeries(policy_name(iteration), [values[k].metric.value if k in values else None for k in keys], style)
        for style, (iteration, values) in enumerate(numbers.by_iteration.items())
        if any(key in values for key in keys)
    ]
    hint = (
        f"Each axis spans the values of the published {main.model} models and of this run, from worst (inside) to best "
        "(at the rim); both ends are given under its name. Compare values along one axis only."
    )
    text = "; ".join(f"{line.name}: {', '.join(fixed(value, 1) for value in line.values)}" for line in series)
    return Figure("All benchmarks", "farther out is better", hint, radar(text, spokes, series), radar_legend(series))
