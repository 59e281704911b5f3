"""Add up what a run cost: time, tokens, peak memory, GPU-hours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from csr_vlm.core.formatting import UNKNOWN, count, duration, fixed
from csr_vlm.report.number_table import NumberTable, TableRow
from csr_vlm.store.run import Run
from csr_vlm.store.stage_names import LABELS, TIMED_STAGES

_NOTE = (
    "Tokens: of all candidates that the search generated, and of the rows that were trained on, with prompts and "
    "images. Memory: peak of the leading process."
)


@dataclass(frozen=True)
class _Costs:
    """Hold the costs of a stage over all iterations; None where they were not recorded."""

    seconds: float | None
    tokens: int | None
    memory_gb: float | None
    gpu_memory_gb: float | None
    gpu_hours: float | None


def cost_table(run: Run) -> NumberTable | None:
    """Tabulate the costs of a run by stage; None before the first stage has finished."""
    costs = {stage: _stage_costs(run, stage) for stage in TIMED_STAGES if run.iterations_done(stage)}
    if not costs:
        return None
    total = replace(_combined(list(costs.values())), tokens=None)  # generated and trained ones are not alike
    columns: list[tuple[str, Callable[[_Costs], str]]] = [
        ("Time", lambda one: duration(one.seconds)),
        ("Tokens", lambda one: count(one.tokens)),
        ("Peak memory", lambda one: _gigabytes(one.memory_gb)),
    ]
    if total.gpu_memory_gb is not None:
        columns.append(("Peak GPU memory", lambda one: _gigabytes(one.gpu_memory_gb)))
    if total.gpu_hours is not None:
        columns.append(("GPU-hours", lambda one: fixed(one.gpu_hours, 2)))
    rows = [(LABELS[stage].capitalize(), one) for stage, one in costs.items()]
    return NumberTable(
        "Runtime and cost",
        "Stage",
        [name for name, _ in columns],
        [TableRow(name, [(write(one), "") for _, write in columns]) for name, one in [*rows, ("All", total)]],
        _NOTE,
    )


def _stage_costs(run: Run, stage: str) -> _Costs:
    return _combined([_costs(run, number, stage) for number in run.iterations_done(stage)])


def _costs(run: Run, iteration: int, stage: str) -> _Costs:
    result = run.result(iteration, stage)
    memory, gpu_memory = result.get("memory_gb"), result.get("gpu_memory_gb")
    hours = _gpu_hours(run, iteration, stage)
    return _Costs(result.get("seconds"), _tokens(stage, result), memory, gpu_memory, hours)


def _tokens(stage: str, result: Mapping[str, Any]) -> int | None:
    if stage == "train":
        # The trainer counts from the beginning of the iteration.
        return max((int(entry["num_tokens"]) for entry in result.get("log", ()) if "num_tokens" in entry), default=None)
    return result.get("tokens")


def _gpu_hours(run: Run, iteration: int, stage: str) -> float | None:
    """Return the GPU-hours of a stage; None if it ran on a CPU or if that is unknown."""
    result, marker = run.result(iteration, stage), max(iteration, 1)
    devices = run.result(marker, "generate").get("devices", {}) if run.is_done(marker, "generate") else {}
    if not devices or "cpu" in devices or "seconds" not in result:
        return None
    processes = {"generate": result.get("processes"), "train": result.get("distribution", {}).get("processes")}
    return float(result["seconds"]) * (processes.get(stage) or 1) / 3600


def _combined(costs: Sequence[_Costs]) -> _Costs:
    def known(name: str) -> list[Any]:
        return [value for one in costs if (value := getattr(one, name)) is not None]

    sums = {name: sum(known(name)) if known(name) else None for name in ("seconds", "tokens", "gpu_hours")}
    peaks = {name: max(known(name), default=None) for name in ("memory_gb", "gpu_memory_gb")}
    return _Costs(**sums, **peaks)


def _gigabytes(value: float | None) -> str:
    return UNKNOWN if value is None else f"{fixed(value, 1 if value >= 10 else 2)} GB"
