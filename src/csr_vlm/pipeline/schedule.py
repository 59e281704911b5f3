"""List the steps of a run, in the order of :func:`csr_vlm.pipeline.loop.align`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean
from typing import Any

from csr_vlm.pipeline import offline_pairs
from csr_vlm.store.run import Run


class State(StrEnum):
    """How far a step is."""

    DONE = "done"
    BEGUN = "begun"
    """Some of its parts are there and will not be made again."""
    TO_DO = "to do"


@dataclass(frozen=True)
class Step:
    """One stage of one iteration; iteration 0 is the base model."""

    iteration: int
    stage: str
    state: State
    seconds: float | None
    """Measured where it is done, else expected from the iterations that are; None where nothing is known."""
    note: str = ""

    def dump(self) -> dict[str, Any]:
        return {**vars(self), "state": self.state.value}


def steps(run: Run) -> list[Step]:
    """List all steps of a run, done or not; of a run that was stopped, those that were done.

    Reads the run's markers and writes nothing; the run need not exist yet.
    """
    found = [_step(run, iteration, stage) for iteration, stage in _order(run)]
    return found if run.stopped_at is None else [step for step in found if step.state is State.DONE]


def seconds_left(found: list[Step]) -> float | None:
    """Add up what the remaining steps are expected to take; None where too little is known."""
    left = [step for step in found if step.state is not State.DONE]
    if not left:
        return 0.0
    known = [step.seconds for step in left if step.stage in {"generate", "train"}]
    return None if not known or None in known else sum(step.seconds or 0.0 for step in left)


def _order(run: Run) -> Iterator[tuple[int, str]]:
    yield 0, "prompts"
    yield 0, "evaluate"
    for iteration in range(1, run.config.iterations + 1):
        outside = offline_pairs.supplies(run.config, iteration)
        yield from ((iteration, stage) for stage in (("pairs",) if outside else ("generate", "pairs", "audit")))
        yield from ((iteration, stage) for stage in ("train", "evaluate", "gate"))


def _step(run: Run, iteration: int, stage: str) -> Step:
    if run.is_done(iteration, stage):
        return Step(iteration, stage, State.DONE, run.result(iteration, stage).get("seconds"))
    others = [run.result(number, stage).get("seconds") for number in run.iterations_done(stage)]
    measured = [seconds for seconds in others if seconds is not None]
    expected = fmean(measured) if measured else None
    parts = len(run.ledger_parts(iteration)) if stage == "generate" else 0
    if not parts:
        return Step(iteration, stage, State.TO_DO, expected)
    number = -(-run.num_prompts // run.config.generation.prompts_per_part)
    rest = None if expected is None else expected * (number - parts) / number
    return Step(iteration, stage, State.BEGUN, rest, f"{parts} of {number} parts")
