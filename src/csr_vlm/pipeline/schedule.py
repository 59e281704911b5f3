"""List the steps of a run in order. The loop, ``--dry-run`` and ``csr watch`` all read this list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean
from typing import Any

from csr_vlm.pipeline.offline_pairs import has_offline_pairs
from csr_vlm.store.run import Run
from csr_vlm.store.stage_names import BASE_STAGES, ITERATION_STAGES, LEDGER_STAGES, TIMED_STAGES


class StepState(StrEnum):
    """Enumerate how far a step can be."""

    DONE = "done"
    BEGUN = "begun"
    """Some ledger parts are written; they are kept."""
    TO_DO = "to do"


@dataclass(frozen=True)
class Step:
    """Represent one stage of one iteration; iteration 0 is the base model."""

    iteration: int
    stage: str
    state: StepState
    seconds: float | None
    """Measured if the step is done, else expected from finished iterations; None if neither is known."""
    note: str = ""

    def dump(self) -> dict[str, Any]:
        """Return the step as JSON data."""
        return {**vars(self), "state": self.state.value}


def schedule(run: Run) -> list[Step]:
    """List all steps of a run, done or not; if the run was stopped, only those that were done.

    Reads the run's markers and writes nothing; the run directory need not exist. Export, model card
    and report are not steps: they are rewritten whenever the loop ends.
    """
    steps = [_step(run, iteration, stage) for iteration, stage in _stages_in_order(run)]
    return steps if run.stopped_at is None else [step for step in steps if step.state is StepState.DONE]


def seconds_left(steps: Sequence[Step], current: float | None = None) -> float | None:
    """Add up the expected durations of the remaining steps.

    Args:
        steps: The schedule of a run.
        current: Seconds left in the step in progress, if measured; it replaces that step's expected duration.

    Returns:
        Seconds, or None if a remaining stage has not been timed in any iteration.
    """
    remaining = [step.seconds for step in steps if step.state is not StepState.DONE and step.stage in TIMED_STAGES]
    if current is not None and remaining:
        remaining[0] = current
    known = [seconds for seconds in remaining if seconds is not None]
    return sum(known) if len(known) == len(remaining) else None


def _stages_in_order(run: Run) -> Iterator[tuple[int, str]]:
    yield from ((0, stage) for stage in BASE_STAGES)
    for iteration in range(1, run.config.iterations + 1):
        skipped = LEDGER_STAGES if has_offline_pairs(run.config, iteration) else frozenset()
        yield from ((iteration, stage) for stage in ITERATION_STAGES if stage not in skipped)


def _step(run: Run, iteration: int, stage: str) -> Step:
    if run.is_done(iteration, stage):
        return Step(iteration, stage, StepState.DONE, run.result(iteration, stage).get("seconds"))
    durations = [run.result(number, stage).get("seconds") for number in run.iterations_done(stage)]
    measured = [seconds for seconds in durations if seconds is not None]
    expected = fmean(measured) if measured else None
    num_done = len(run.ledger_parts(iteration)) if stage == "generate" and run.is_done(0, "prompts") else 0
    if not num_done:
        return Step(iteration, stage, StepState.TO_DO, expected)
    num_parts = -(-run.num_prompts // run.config.generation.prompts_per_part)
    left = None if expected is None else expected * (num_parts - num_done) / num_parts
    return Step(iteration, stage, StepState.BEGUN, left, f"{num_done} of {num_parts} parts")
