"""What a working process leaves in the run directory for those who watch: ``RUN/progress.json``.

It is written atomically, at most every other second, and holds nothing that a result depends
on: a run goes on without it, and it may be deleted at any time.
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

from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Progress, Reporter
from csr_vlm.store import files

State = Literal["working", "done", "failed", "interrupted"]
EVERY_SECONDS = 2.0
"""The least time between two writes, apart from those at the ends of a stage."""
_WINDOW = 16
"""Steps of progress that the rate is measured over: a resumed stage passes what it has in no time."""
_REMEMBERED = 8


@dataclass
class Stage:
    """What is being done, and how far it is."""

    title: str
    total: int
    """0 where it is not known."""
    started: float
    done: int = 0
    rate: float | None = None
    """Items a second, lately."""
    numbers: dict[str, float] = field(default_factory=dict)
    """What the work itself reports, such as the loss of the last step."""


@dataclass
class ProgressRecord:
    """One process's account of its work; times are Unix seconds."""

    pid: int
    host: str
    started: float
    updated: float
    state: State = "working"
    error: str = ""
    stage: Stage | None = None
    said: list[str] = field(default_factory=list)
    """The last lines it had to say."""


def progress_path(root: Path) -> Path:
    return root / "progress.json"


def read_progress(root: Path) -> ProgressRecord | None:
    """Read the account of whoever worked here last; None where there is none that reads."""
    try:
        found = files.read_document(progress_path(root))
        stage = None if found["stage"] is None else Stage(**found["stage"])
        return ProgressRecord(**found | {"stage": stage})
    except (CsrError, TypeError):
        return None  # absent, damaged, or another version's


@contextmanager
def record_progress(root: Path, reporter: Reporter) -> Iterator[Reporter]:
    """Pass everything on to ``tell`` and keep ``RUN/progress.json`` besides; the run must be locked."""
    recorder = ProgressRecorder(root, reporter)
    recorder.write()
    try:
        yield recorder
    except BaseException as error:
        recorder.end("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", _told(error))
        raise
    recorder.end("done")


def _told(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


class ProgressRecorder:
    """A reporter that also writes down what it hears."""

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
        self._progress.said = [*self._progress.said, text][-_REMEMBERED:]
        self.write_now_and_then()
        self._reporter.log(text)

    def write_now_and_then(self) -> None:
        """Write unless it was done a moment ago."""
        if time.monotonic() - self._written >= EVERY_SECONDS:
            self.write()

    def write(self) -> None:
        self._progress.updated = time.time()
        # Nobody's results hang on it: a full disk or a lost mount is told by the work itself.
        with contextlib.suppress(CsrError, OSError):
            files.write_json(self._path, asdict(self._progress))
        self._written = time.monotonic()

    def end(self, state: State, error: str = "") -> None:
        """Say how the work ended; the stage stays where it broke off."""
        self._progress.state, self._progress.error = state, error
        self.write()


class _RecordedProgress:
    """Counts a stage's items, for the file and for whoever shows them."""

    def __init__(self, recorder: ProgressRecorder, stage: Stage, progress: Progress) -> None:
        self._recorder = recorder
        self._stage = stage
        self._progress = progress
        self._steps: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], maxlen=_WINDOW)

    def advance(self, number: int = 1) -> None:
        self._stage.done += number
        now = time.monotonic()
        then, before = self._steps[0]
        if now > then:
            self._stage.rate = (self._stage.done - before) / (now - then)
        self._steps.append((now, self._stage.done))
        self._recorder.write_now_and_then()
        self._progress.advance(number)

    def set_total(self, total: int) -> None:
        self._stage.total = total
        self._progress.set_total(total)

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        self._stage.numbers |= metrics
        self._recorder.write_now_and_then()
        self._progress.log_metrics(metrics)
