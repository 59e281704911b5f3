"""Say what would shorten a run, and what would make it fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from csr_vlm.config.load import merged, resolve
from csr_vlm.core.errors import CsrError
from csr_vlm.pipeline.memory_costs import memory_bytes
from csr_vlm.pipeline.stage_costs import StageCosts

_WORTHWHILE = 0.85
"""Share of the time that a change must leave at most to be named."""
_MOST = 4
_MAX_ROWS = 2048
_ITEM_ROWS = 4
"""Rows of the budget for each prompt of a work item."""


def faster(costs: StageCosts, hours: Callable[[StageCosts], float]) -> list[str]:
    """Name changes that shorten a run notably, each with the hours that it leaves, the best first.

    Args:
        costs: Costs of the run in the likely case.
        hours: Computes the hours of a changed run.
    """
    before = hours(costs)
    found = []
    for text, changed in _changes(costs):
        fits = not costs.hardware.memory or max(memory_bytes(changed).values()) <= costs.hardware.memory
        after = hours(changed)
        if fits and after <= _WORTHWHILE * before:
            found.append((after, f"{text}: {_hours(after)} instead of {_hours(before)}"))
    return [text for _, text in sorted(found)[:_MOST]]


def fitting_rows(costs: StageCosts) -> int | None:
    """Return the largest power of two that generation.max_rows can be; None if not even 1 fits."""
    rows = 1 << (costs.max_rows.bit_length() - 1)
    while rows:
        if memory_bytes(_changed(costs, {"generation": {"max_rows": rows}}))["search"] <= costs.hardware.memory:
            return rows
        rows //= 2
    return None


def _changes(costs: StageCosts) -> Iterator[tuple[str, StageCosts]]:
    """Yield changes of the settings that the method allows, then of the hardware and of the amount of work."""
    config = costs.config
    for rows in () if config.generation.max_rows == "auto" else _larger_budgets(config.generation.max_rows):
        items = max(config.generation.prompts_per_part, rows // _ITEM_ROWS)
        changed = _changed(costs, {"generation": {"max_rows": rows, "prompts_per_part": items}})
        if not costs.hardware.memory or memory_bytes(changed)["search"] <= costs.hardware.memory:
            yield f"generation.max_rows={rows} generation.prompts_per_part={items}", changed
            break
    if not costs.uses_vllm and not costs.hardware.is_cpu:
        with suppress(CsrError):  # vLLM does not support some other settings.
            yield "generation.engine=vllm", _changed(costs, {"generation": {"engine": "vllm"}})
    if not costs.hardware.is_cpu:
        twice = replace(costs.hardware, count=2 * costs.hardware.count)
        yield f"twice the GPUs ({twice.label})", replace(costs, hardware=twice)
    if costs.num_questions:
        yield (
            "method.pairs.questions.per_prompt=0 (no claim questions)",
            _changed(costs, {"method": {"pairs": {"questions": {"per_prompt": 0}}}}),
        )
    half = max(costs.num_prompts // 2, 1)
    yield f"data.limit={half}", replace(costs, num_prompts=half)


def _larger_budgets(rows: int) -> Iterator[int]:
    """Yield powers of two above a number of rows, from the largest."""
    budget = _MAX_ROWS
    while budget > rows:
        yield budget
        budget //= 2


def _changed(costs: StageCosts, settings: dict[str, Any]) -> StageCosts:
    return replace(costs, config=resolve(merged(costs.config.dump(), settings)))


def _hours(hours: float) -> str:
    """Format hours, or minutes if they are few.

    Example:
        >>> _hours(0.2), _hours(2.06), _hours(1234)
        ('12 min', '2.1 h', '1,234 h')
    """
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:.2g} h" if hours < 10 else f"{hours:,.0f} h"
