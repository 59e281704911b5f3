"""Record the progress of a running process in ``RUN/progress.json``, for ``csr watch``.

The file is written atomically, at most every two seconds. No result depends on it: it can be
deleted at any time.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Progress, Reporter
from csr_vlm.core.secrets import without_secrets
from csr_vlm.store import files

ProcessState = Literal["working", "done", "failed", "interrupted"]
EVERY_SECONDS = 2.0
"""Minimum time between two writes, except those at the start and end of a stage."""
_WINDOW = 16
"""Updates over which the rate is measured; a resumed stage skips its finished items in no time."""
_NUM_LOG_LINES = 8


@dataclass
class Stage:
    """Hold how far the current stage is."""

    title: str
    total: int
    """0 if unknown."""
    started: float
    done: int = 0
    rate: float | None = None
    """Recent items per second."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Metrics of the stage, such as the loss of the last step."""


@dataclass
class ProgressRecord:
    """Hold the progress of one process; times are in Unix seconds."""

    pid: int
    host: str
    started: float
    updated: float
    state: ProcessState = "working"
    error: str = ""
    stage: Stage | None = None
    said: list[str] = field(default_factory=list)
    """The last log lines."""

    def may_be_running(self) -> bool:
        """Return whether the process may still be running; for another machine, whether it did not record its end."""
        if self.state != "working" or self.host != platform.node():
            return self.state == "working"
        return bool(psutil.pid_exists(self.pid))


def progress_path(root: Path) -> Path:
    """Return the path of a run's progress file."""
    return root / "progress.json"


def read_progress(root: Path) -> ProgressRecord | None:
    """Read the progress of the last process; None if it is missing, damaged, or of another version."""
    try:
        document = files.read_document(progress_path(root))
        stage = None if document["stage"] is None else Stage(**document["stage"])
        return ProgressRecord(**document | {"stage": stage})
    except (CsrError, TypeError):
        return None


@contextmanager
def record_progress(root: Path, reporter: Reporter) -> Iterator[Reporter]:
    """Forward everything to ``reporter`` and record it in ``RUN/progress.json``; the run must be locked."""
    recorder = ProgressRecorder(root, reporter)
    recorder.write()
    try:
        yield recorder
    except BaseException as error:
        recorder.end("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", _first_line(error))
        raise
    recorder.end("done")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


class ProgressRecorder:
    """Forward everything to a reporter, and record it."""

    def __init__(self, root: Path, reporter: Reporter) -> None:
        now = time.time()
        self._path = progress_path(root)
        self._reporter = reporter
        self._written = 0.0
        self._progress = ProgressRecord(os.getpid(), platform.node(), now, now)

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Progress]:
        outer = self._progress.stage
        stage = Stage(title, total, time.time())
        self._progress.stage = stage
        self.write()
        with self._reporter.stage(title, total) as progress:
            yield _RecordedProgress(self, stage, progress)
        self._progress.stage = outer
        self.write()

    def log(self, text: str) -> None:
        self._progress.said = [*self._progress.said, text][-_NUM_LOG_LINES:]
        self.write_if_due()
        self._reporter.log(text)

    def write_if_due(self) -> None:
        """Write the file unless the last write was a moment ago."""
        if time.monotonic() - self._written >= EVERY_SECONDS:
            self.write()

    def write(self) -> None:
        """Write the file."""
        self._progress.updated = time.time()
        # No result depends on it: a full disk or a lost mount is reported by the work itself.
        with contextlib.suppress(CsrError, OSError):
            files.write_json(self._path, without_secrets(asdict(self._progress)))
        self._written = time.monotonic()

    def end(self, state: ProcessState, error: str = "") -> None:
        """Record how the process ended; the stage in which it ended is kept."""
        self._progress.state, self._progress.error = state, error
        self.write()


class _RecordedProgress:
    """Forward the progress of one stage, and record it."""

    def __init__(self, recorder: ProgressRecorder, stage: Stage, progress: Progress) -> None:
        self._recorder = recorder
        self._stage = stage
        self._progress = progress
        self._updates: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], maxlen=_WINDOW)

    def advance(self, number: int = 1) -> None:
        self._stage.done += number
        now = time.monotonic()
        since, done_before = self._updates[0]
        if now > since:
            self._stage.rate = (self._stage.done - done_before) / (now - since)
        self._updates.append((now, self._stage.done))
        self._recorder.write_if_due()
        self._progress.advance(number)

    def set_total(self, total: int) -> None:
        self._stage.total = total
        self._progress.set_total(total)

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        self._stage.numbers |= metrics
        self._recorder.write_if_due()
        self._progress.log_metrics(metrics)
