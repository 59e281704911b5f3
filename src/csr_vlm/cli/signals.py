"""Handle Ctrl-C and SIGTERM: finish the current work item, say how to resume, and exit."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from csr_vlm.core.progress import Progress, Reporter

PATIENCE = 20
"""Seconds that the current work item may still take; cluster schedulers kill after 30."""


_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGALRM") if hasattr(signal, name))
"""Windows has no SIGALRM: there the current item is waited for until a second signal."""


def _set_alarm(seconds: int) -> None:
    """Send SIGALRM after so many seconds, where the system has it; 0 cancels."""
    if hasattr(signal, "SIGALRM"):
        signal.alarm(seconds)


class Stopped(SystemExit):
    """Exit because of a signal, with code 128 plus its number, as shells do."""


class _Stop:
    """Remember a signal until the current work item is finished."""

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Remember the first signal; exit at once on a second one or after ``PATIENCE`` seconds."""
        del frame
        if self.requested is not None:
            self.exit_if_requested()
        self.requested = signal.Signals(number)
        _set_alarm(PATIENCE)
        print(
            f"{self.requested.name}: finishing the current work item (at most {PATIENCE} s); repeat to stop at once",
            file=sys.stderr,
        )

    def exit_if_requested(self) -> None:
        """Exit if a signal was remembered."""
        if self.requested is not None:
            raise Stopped(128 + self.requested)


class _StoppableProgress:
    """Count finished items; exit after an item if a signal came."""

    def __init__(self, progress: Progress, stop: _Stop) -> None:
        self._progress = progress
        self._stop = stop

    def advance(self, number: int = 1) -> None:
        self._progress.advance(number)
        self._stop.exit_if_requested()

    def set_total(self, total: int) -> None:
        self._progress.set_total(total)

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        self._progress.log_metrics(metrics)


class _StoppableReporter:
    """Pass everything on to another reporter; exit between two items if a signal came."""

    def __init__(self, reporter: Reporter, stop: _Stop) -> None:
        self._reporter = reporter
        self._stop = stop

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Progress]:
        self._stop.exit_if_requested()
        with self._reporter.stage(title, total) as progress:
            yield _StoppableProgress(progress, self._stop)

    def log(self, text: str) -> None:
        self._reporter.log(text)


@contextmanager
def stoppable(reporter: Reporter, run: Path) -> Iterator[Reporter]:
    """Yield a reporter through which signals end the work after the next finished item.

    An item is a ledger part, a row of input or a training step. Finished ledger parts are kept; other
    stages start over when the run is resumed.

    Args:
        reporter: Receives progress and log lines.
        run: Run directory, named in the message on how to resume.

    Raises:
        Stopped: A signal came.
    """
    stop = _Stop()
    before = {number: signal.signal(number, stop.handle) for number in _SIGNALS}
    try:
        yield _StoppableReporter(reporter, stop)
    except Stopped:
        assert stop.requested is not None
        print(f"stopped by {stop.requested.name}; finished work is kept. Resume with: csr run {run}", file=sys.stderr)
        raise
    finally:
        _set_alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)
