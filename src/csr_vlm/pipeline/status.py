"""What a run is doing, read from its directory alone: the view that ``csr watch`` shows.

Whether somebody works in it is asked of the lock, which the system frees however the process
ends; how far the work is stands in ``progress.json``, what is done in the stages' markers.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import pyarrow.parquet as pq

from csr_vlm.core.batching import evenly_spaced
from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.compare import policy_name
from csr_vlm.method.pairs import responses
from csr_vlm.store import files, tables
from csr_vlm.store.progress_file import ProgressRecord, read_progress
from csr_vlm.store.run import Run

State = Literal["waiting", "running", "finished", "failed", "interrupted", "gone"]
"""``gone``: the process ended without a word; ``waiting``: none has begun."""
STAGES = ("generate", "pairs", "train", "evaluate")
_MOST_SAMPLES = 3
_MOST_CHARS = 400


@dataclass(frozen=True)
class Current:
    """The stage in progress."""

    title: str
    done: int
    total: int
    """0 where it is not known."""
    rate: float | None
    """Items a second."""
    seconds: float
    """Since it began."""
    left: float | None
    """Seconds until it is done, at this rate."""
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class Spoken:
    """A response that the policy gave lately."""

    prompt_id: str
    text: str
    source: str


@dataclass(frozen=True)
class View:
    run: str
    model: str
    state: State
    why: str
    """How the work ended, where it did."""
    iterations: int
    current: Current | None
    left: float | None
    """Seconds until the whole run is done; None until every kind of stage was timed."""
    quiet_for: float | None
    """Seconds since the process last wrote down its progress."""
    stages: Mapping[int, Mapping[str, float | None]]
    """Iteration (0: the base model) to finished stage to its seconds."""
    metrics: Mapping[int, Mapping[str, Any]]
    said: Sequence[str]
    samples: Sequence[Spoken]

    def dump(self) -> dict[str, Any]:
        return asdict(self)


class Watcher:
    """Looks at a run again and again; what is slow to read is read when it changes."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._read: Path | None = None
        self._samples: Sequence[Spoken] = ()

    def look(self) -> View:
        """Take one view."""
        run = self._run
        in_use, progress = run.in_use(), read_progress(run.root)
        state = _state(run, in_use, progress)
        if progress is not None and in_use and not _is_at_work(progress):
            progress = None  # another command works here now, one that keeps no account
        current = _current(progress) if progress is not None and state != "finished" else None
        stages = _stages(run)
        return View(
            run=str(run.root),
            model=run.config.model.path,
            state=state,
            why=_why(run, state, progress),
            iterations=run.config.iterations,
            current=current,
            left=_left(run, stages, current) if state == "running" else None,
            quiet_for=time.time() - progress.updated if progress is not None and state == "running" else None,
            stages=stages,
            metrics={number: run.metrics(number) for number in run.iterations_done("evaluate")},
            said=progress.said if progress is not None else (),
            samples=self._newest_samples(),
        )

    def _newest_samples(self) -> Sequence[Spoken]:
        path = _newest(self._run)
        if path is not None and path != self._read:
            self._samples = _samples(self._run, path)
            self._read = path
        return self._samples


def _state(run: Run, in_use: bool, progress: ProgressRecord | None) -> State:
    if in_use:
        return "running"
    if run.is_finished:
        return "finished"
    if progress is None:
        return "waiting"
    # A single stage that was asked for may be done where the run is not.
    return {"working": "gone", "done": "waiting", "failed": "failed", "interrupted": "interrupted"}[progress.state]  # type: ignore[return-value]


def _is_at_work(progress: ProgressRecord) -> bool:
    """Whether who wrote the account may still be writing it; of another machine's processes nothing is known."""
    if progress.state != "working" or progress.host != platform.node():
        return progress.state == "working"
    try:
        os.kill(progress.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _why(run: Run, state: State, progress: ProgressRecord | None) -> str:
    if state == "finished" and run.stopped_at is not None:
        return f"stopped at iteration {run.stopped_at}; the result is {policy_name(run.final)}"
    if state == "failed" and progress is not None:
        return progress.error
    return {"gone": "its process ended without a word", "waiting": "nobody works in it"}.get(state, "")


def _current(progress: ProgressRecord) -> Current | None:
    stage = progress.stage
    if stage is None:
        return None
    left = None
    if stage.total and stage.rate:
        passed = time.time() - progress.updated if progress.state == "working" else 0.0
        left = max((stage.total - stage.done) / stage.rate - passed, 0.0)
    seconds = progress.updated - stage.started
    return Current(stage.title, stage.done, stage.total, stage.rate, seconds, left, stage.numbers)


def _stages(run: Run) -> dict[int, dict[str, float | None]]:
    return {
        number: {stage: run.result(number, stage).get("seconds") for stage in STAGES if run.is_done(number, stage)}
        for number in range(run.config.iterations + 1)
    }


def _left(run: Run, stages: Mapping[int, Mapping[str, float | None]], current: Current | None) -> float | None:
    """Add up what is to do, each stage as long as its like took; the one at work by its own rate."""
    took = {
        stage: [seconds for mine in stages.values() if (seconds := mine.get(stage)) is not None] for stage in STAGES
    }
    missing = [
        stage
        for number in range(run.config.iterations + 1)
        for stage in (STAGES if number else STAGES[-1:])
        if stage not in stages[number]
    ]
    if current is not None and current.left is not None and missing:
        first, missing = current.left, missing[1:]
    else:
        first = 0.0
    if not all(took[stage] for stage in missing):
        return None
    return first + sum(fmean(took[stage]) for stage in missing)


def _newest(run: Run) -> Path | None:
    """Return the evaluation or ledger part that was written last."""
    paths = [
        path
        for number in range(run.config.iterations + 1)
        for path in (*run.ledger_parts(number), *(run.evaluation_path(number, name) for name in ("heldout", "world")))
        if path.is_file()
    ]
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def _samples(run: Run, path: Path) -> list[Spoken]:
    """Take some responses from an evaluation, or the best ones of a ledger part."""
    number = int(path.parent.parent.name.removeprefix("iteration-"))
    if path.suffix == ".json":
        rows = files.read_json(path)["rows"]
        source = f"{policy_name(number)}, {path.stem}"
        return [Spoken(str(row["id"]), _short(row["text"]), source) for row in evenly_spaced(rows, _MOST_SAMPLES)]
    ids = dict.fromkeys(pq.read_table(path, columns=["prompt_id"]).column("prompt_id").to_pylist())
    found = []
    for prompt_id in list(ids)[-_MOST_SAMPLES:]:
        nodes = tables.read_nodes_of(path, [prompt_id])
        try:
            said = responses(nodes, run.config.method, run.config.scorer.used)
        except CsrError:  # scored otherwise than the run is configured now
            continue
        if said:
            best = max(said, key=lambda response: response.reward)
            found.append(Spoken(prompt_id, _short(best.text), f"{policy_name(number - 1)}, best of its search"))
    return found


def _short(text: str) -> str:
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]} …"
