"""Format means over seeds with their intervals over scenes and over runs, and compare runs paired by seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from csr_vlm.evaluation.metrics import metric_spec
from csr_vlm.evaluation.statistics import Difference, Metric, Tally, established, over_runs, paired_difference, ratio

SceneTallies = Mapping[str, Mapping[str, Tally]]
"""Scene id to its tallies, by metric."""
Runs = Mapping[int, SceneTallies]
"""Seed of a run to what it made of the scenes."""

LEGEND = (
    "Each cell: mean over seeds (95 % interval over scenes; over runs, Student t). * marks a difference from "
    "{reference}, paired by seed, that is established: its intervals over scenes and over runs both exclude 0."
)


def seeds_needed(group: str) -> int:
    """Return how many seeds a row of a group of jobs needs: 5 for headline rows, 3 for the rest."""
    return 5 if group == "main" else 3


def seeds_cell(seeds: int, needed: int) -> str:
    """Say how many seeds a row has, and whether they are too few.

    Example:
        >>> [seeds_cell(number, 5) for number in (1, 3, 5)]
        ['1 seed, no interval over runs', '3 seeds of 5', '5']
    """
    if seeds == 1:
        return "1 seed, no interval over runs"
    return str(seeds) if seeds >= needed else f"{seeds} seeds of {needed}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def interval(found: Metric | Difference, number: str = "{:.3f}", missing: str = "no interval") -> str:
    """Format the interval of a metric or difference, or say that it has none."""
    if found.low is None or found.high is None:
        return missing
    return f"{number.format(found.low)} to {number.format(found.high)}"


def levels(runs: Runs, name: str) -> tuple[Metric, Metric]:
    """Compute a metric over scenes, from the sums of all runs, and over runs, from the value of each."""
    each = [total for scenes in runs.values() if (total := _total(scenes, name))[1]]
    step = max((1 / bottom for _, bottom in each), default=0.0)
    tallies = _summed(list(runs.values()), name)
    scenes = ratio([top for top, _ in tallies], [bottom for _, bottom in tallies])
    return scenes, over_runs([top / bottom for top, bottom in each], step)


def difference(before: Runs, after: Runs, name: str) -> tuple[Difference, Metric]:
    """Compute after - before over scenes and over runs, from the seeds that both have."""
    seeds = [seed for seed in after if seed in before]
    sides = [_summed([runs[seed] for seed in seeds], name) for runs in (before, after)]
    totals = [(_total(before[seed], name), _total(after[seed], name)) for seed in seeds]
    known = [(old, new) for old, new in totals if old[1] and new[1]]
    step = max((1 / bottom for pair in known for _, bottom in pair), default=0.0)
    changes = [new[0] / new[1] - old[0] / old[1] for old, new in known]
    return paired_difference(*sides), over_runs(changes, step)


def cell(runs: Runs, name: str, reference: Runs | None = None) -> str:
    """Format a metric of some runs, and mark an established difference from the reference."""
    scenes, over = levels(runs, name)
    if over.value is None:
        return "-"
    form = metric_spec(name).format
    mark = "*" if reference and established(*difference(reference, runs, name)) else ""
    parts = [
        "no interval" if found.low is None or found.high is None else f"{form(found.low)} to {form(found.high)}"
        for found in (scenes, over)
    ]
    if over.n == 1:
        parts[1] = "1 seed"
    return f"{form(over.value)}{mark} ({parts[0]}; {parts[1]})"


def base_cell(scenes: SceneTallies, name: str) -> str:
    """Format a metric of the base model, which no run has changed, with its interval over scenes alone."""
    found, _ = levels({0: scenes}, name)
    if found.value is None or found.low is None or found.high is None:
        return "-"
    form = metric_spec(name).format
    return f"{form(found.value)} ({form(found.low)} to {form(found.high)})"


def _summed(runs: Sequence[SceneTallies], name: str) -> list[Tally]:
    """Sum each scene's tallies of a metric over runs, in the order of the first run's scenes."""
    first = runs[0] if runs else {}
    return [
        (sum(run[scene][name][0] for run in runs), sum(run[scene][name][1] for run in runs))
        for scene in first
        if all(name in run[scene] for run in runs)
    ]


def _total(scenes: SceneTallies, name: str) -> Tally:
    """Sum a metric's tallies over scenes."""
    tallies = _summed([scenes], name)
    return sum(top for top, _ in tallies), sum(bottom for _, bottom in tallies)
