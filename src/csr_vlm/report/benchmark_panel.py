"""The benchmarks that a run was measured on beside its own evaluation: a table, and a radar chart of three or more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from csr_vlm.core.formatting import fixed
from csr_vlm.evaluation.compare import policy_name
from csr_vlm.evaluation.reproduction import Published, RunResults, collect_results, published
from csr_vlm.report.grid import Grid, Row
from csr_vlm.report.panels import Figure, interval
from csr_vlm.report.radar import Shape, Spoke, legend_of, radar
from csr_vlm.store.run import Run


@dataclass(frozen=True)
class Benchmarks:
    grid: Grid
    figure: Figure | None
    """None with fewer than three benchmarks."""


def benchmark_panel(run: Run) -> Benchmarks | None:
    """Gather the stored benchmarks of the paper, policy by policy; None where there are none."""
    tables, found = published(), collect_results(run)
    keys = [
        key
        for key in tables.benchmarks
        if any(key in mine and mine[key].same_data for mine in found.by_iteration.values())
    ]
    if not keys:
        return None
    return Benchmarks(_grid(tables, found, keys), _figure(tables, found, keys) if len(keys) > 2 else None)


def _grid(tables: Published, found: RunResults, keys: Sequence[str]) -> Grid:
    rows = []
    for number, mine in found.by_iteration.items():
        cells = [
            (fixed(mine[key].metric.value, 1), interval(mine[key].metric, 1)) if key in mine else ("–", "")
            for key in keys
        ]
        if any(key in mine for key in keys):
            rows.append(Row(policy_name(number), cells))
    columns = [f"{tables.benchmarks[k].name} {'↓' if tables.benchmarks[k].better == 'lower' else '↑'}" for k in keys]
    note = "In the units of the paper's tables; csr reproduce sets them beside the published numbers."
    return Grid("Benchmarks, with 95 % intervals where there are any", "Policy", columns, rows, note)


def _figure(tables: Published, found: RunResults, keys: Sequence[str]) -> Figure:
    main = tables.main_table(found.run.config.model.path)
    column = {key: place for place, key in enumerate(main.columns)}
    spokes = [
        Spoke(
            tables.benchmarks[key].name,
            tables.benchmarks[key].better == "lower",
            [values[column[key]] for values in main.rows.values()] if key in column else (),
        )
        for key in keys
    ]
    shapes = [
        Shape(policy_name(number), [mine[key].metric.value if key in mine else None for key in keys], style)
        for style, (number, mine) in enumerate(found.by_iteration.items())
        if any(key in mine for key in keys)
    ]
    hint = (
        f"Each spoke runs from the worst (inside) to the best (at the rim) of the published {main.model} models and "
        "this run; both stand under its name. Only compare shapes along one spoke."
    )
    text = "; ".join(f"{shape.name}: {', '.join(fixed(value, 1) for value in shape.values)}" for shape in shapes)
    return Figure("All benchmarks", "further out is better", hint, radar(text, spokes, shapes), legend_of(shapes))
