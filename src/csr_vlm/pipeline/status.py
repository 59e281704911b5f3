"""Read what a run is doing from its directory alone, for ``csr watch``.

The lock shows whether a process works in the directory (the system frees it however the process
ends), ``progress.json`` how far the current stage is, and the stages' markers what is done.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from csr_vlm.core.batching import evenly_spaced
from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.compare import policy_name
from csr_vlm.method.pairs import responses
from csr_vlm.pipeline.schedule import Step, StepState, schedule, seconds_left
from csr_vlm.store import files, tables
from csr_vlm.store.progress_file import ProgressRecord, read_progress
from csr_vlm.store.run import Run
from csr_vlm.store.stage_names import TIMED_STAGES

RunState = Literal["waiting", "running", "finished", "failed", "interrupted", "gone"]
"""``gone``: the process exited unexpectedly; ``waiting``: no process has begun."""
_MAX_SAMPLES = 3
_MAX_CHARS = 400


@dataclass(frozen=True)
class CurrentStage:
    """Represent the stage in progress."""

    title: str
    done: int
    total: int
    """0 if unknown."""
    rate: float | None
    """Items per second."""
    seconds: float
    """Seconds since the stage began."""
    left: float | None
    """Seconds left at this rate."""
    numbers: Mapping[str, float]
    """Metrics that the stage reports, such as the training loss."""


@dataclass(frozen=True)
class SampleResponse:
    """Represent a recent response of the policy."""

    prompt_id: str
    text: str
    source: str


@dataclass(frozen=True)
class RunStatus:
    """Represent the status of a run at one moment."""

    run: str
    model: str
    state: RunState
    why: str
    """How the work ended; empty while it goes on."""
    iterations: int
    current: CurrentStage | None
    left: float | None
    """Seconds left in the whole run; None until every kind of stage has been timed."""
    quiet_for: float | None
    """Seconds since the process last updated its progress file."""
    stages: Mapping[int, Mapping[str, float | None]]
    """Seconds of each finished stage, by iteration (0: base model)."""
    metrics: Mapping[int, Mapping[str, Any]]
    said: Sequence[str]
    """Last log lines."""
    samples: Sequence[SampleResponse]

    def dump(self) -> dict[str, Any]:
        """Return the status as JSON data."""
        return asdict(self)


class Watcher:
    """Read the status of a run repeatedly; sample responses are read again only when they change."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._samples_path: Path | None = None
        self._samples: Sequence[SampleResponse] = ()

    def read(self) -> RunStatus:
        """Read the status now."""
        run = self._run
        in_use, progress = run.in_use(), read_progress(run.root)
        state = _state(run, in_use, progress)
        if progress is not None and in_use and not progress.may_be_running():
            progress = None  # another command works here and writes no progress file
        current = _current(progress) if progress is not None and state != "finished" else None
        steps = schedule(run)
        return RunStatus(
            run=str(run.root),
            model=run.config.model.path,
            state=state,
            why=_why(run, state, progress),
            iterations=run.config.iterations,
            current=current,
            left=seconds_left(steps, current.left if current else None) if state == "running" else None,
            quiet_for=_since(progress.updated) if progress is not None and state == "running" else None,
            stages=_durations(run, steps),
            metrics={number: run.metrics(number) for number in run.iterations_done("evaluate")},
            said=progress.said if progress is not None else (),
            samples=self._newest_samples(),
        )

    def _newest_samples(self) -> Sequence[SampleResponse]:
        path = _newest_responses(self._run)
        if path is not None and path != self._samples_path:
            self._samples = _samples(self._run, path)
            self._samples_path = path
        return self._samples


def _state(run: Run, in_use: bool, progress: ProgressRecord | None) -> RunState:
    if in_use:
        return "running"
    if run.is_finished:
        return "finished"
    if progress is None:
        return "waiting"
    # A command may have finished one stage of a run that is not finished.
    return {"working": "gone", "done": "waiting", "failed": "failed", "interrupted": "interrupted"}[progress.state]  # type: ignore[return-value]


def _why(run: Run, state: RunState, progress: ProgressRecord | None) -> str:
    if state == "finished" and run.stopped_at is not None:
        return f"stopped at iteration {run.stopped_at}; the result is {policy_name(run.final)}"
    if state == "failed" and progress is not None:
        return progress.error
    return {"gone": "the process exited unexpectedly", "waiting": "idle"}.get(state, "")


def _since(moment: float) -> float:
    """Return the seconds since a moment of the clock; 0 if the clock was set back meanwhile."""
    return max(time.time() - moment, 0.0)


def _current(progress: ProgressRecord) -> CurrentStage | None:
    stage = progress.stage
    if stage is None:
        return None
    left = None
    if stage.total and stage.rate:
        elapsed = _since(progress.updated) if progress.state == "working" else 0.0
        left = max((stage.total - stage.done) / stage.rate - elapsed, 0.0)
    seconds = max(progress.updated - stage.started, 0.0)
    return CurrentStage(stage.title, stage.done, stage.total, stage.rate, seconds, left, stage.numbers)


def _durations(run: Run, steps: Sequence[Step]) -> dict[int, dict[str, float | None]]:
    durations: dict[int, dict[str, float | None]] = {number: {} for number in range(run.config.iterations + 1)}
    for step in steps:
        if step.state is StepState.DONE and step.stage in TIMED_STAGES:
            durations[step.iteration][step.stage] = step.seconds
    return durations


def _newest_responses(run: Run) -> Path | None:
    """Return the evaluation or ledger part that was written last."""
    paths = [
        path
        for number in range(run.config.iterations + 1)
        for path in (*run.ledger_parts(number), *(run.evaluation_path(number, name) for name in ("heldout", "world")))
        if path.is_file()
    ]
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def _samples(run: Run, path: Path) -> list[SampleResponse]:
    """Select some responses of an evaluation, or the best responses of some prompts in a ledger part."""
    number = int(path.parent.parent.name.removeprefix("iteration-"))
    if path.suffix == ".json":
        rows = evenly_spaced(files.read_json(path)["rows"], _MAX_SAMPLES)
        source = f"{policy_name(number)}, {path.stem}"
        return [SampleResponse(str(row["id"]), _shorten(row["text"]), source) for row in rows]
    prompt_ids = dict.fromkeys(pq.read_table(path, columns=["prompt_id"]).column("prompt_id").to_pylist())
    source = f"{policy_name(number - 1)}, best of its search"
    samples = []
    for prompt_id in list(prompt_ids)[-_MAX_SAMPLES:]:
        nodes = tables.read_nodes_of(path, [prompt_id])
        try:
            complete = responses(nodes, run.config.method, run.config.scorer.used)
        except CsrError:  # the ledger lacks a score that the current configuration names
            continue
        if complete:
            best = max(complete, key=lambda response: response.reward)
            samples.append(SampleResponse(prompt_id, _shorten(best.text), source))
    return samples


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]} …"
