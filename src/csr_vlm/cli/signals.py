"""Ctrl-C and SIGTERM: finish what is in hand, say how to go on, and go."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from csr_vlm.core.progress import Progress, Reporter

PATIENCE = 20
"""Seconds that the part in hand may still take; schedulers kill after thirty."""


class Stopped(SystemExit):
    """A signal asked for the end; the code is 128 plus its number, as shells have it."""


class _Stop:
    """Remembers a signal until there is a good moment for it."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; leave at once on a second, or when patience is at its end."""
        del frame
        if self.asked is not None:
            self.leave_if_asked()
        self.asked = signal.Signals(number)
        signal.alarm(PATIENCE)
        print(
            f"{self.asked.name}: finishing the part in hand, for at most {PATIENCE} s; once more stops at once",
            file=sys.stderr,
        )

    def leave_if_asked(self) -> None:
        if self.asked is not None:
            raise Stopped(128 + self.asked)


class _StoppableProgress:
    """Counts finished items, and stops after one if a signal came."""

    def __init__(self, progress: Progress, stop: _Stop) -> None:
        self._progress = progress
        self._stop = stop

    def advance(self, number: int = 1) -> None:
        self._progress.advance(number)
        self._stop.leave_if_asked()

    def set_total(self, total: int) -> None:
        self._progress.set_total(total)

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        self._progress.log_metrics(metrics)


class _Reporter:
    """Shows the progress of another, and ends the work between two of its items."""

    def __init__(self, reporter: Reporter, stop: _Stop) -> None:
        self._reporter = reporter
        self._stop = stop

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Progress]:
        self._stop.leave_if_asked()
        with self._reporter.stage(title, total) as progress:
            yield _StoppableProgress(progress, self._stop)

    def log(self, text: str) -> None:
        self._reporter.log(text)


@contextmanager
def stoppable(reporter: Reporter, run: Path) -> Iterator[Reporter]:
    """Give a reporter through which signals end the work at the next finished item.

    An item is a part of the ledger, a row of input, or a training step: what a stage that
    starts over loses is no more than itself, and a part of the ledger is not lost.

    Args:
        run: Directory of the run that works, named in the parting words.

    Raises:
        Stopped: A signal came.
    """
    stop = _Stop()
    before = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    try:
        yield _Reporter(reporter, stop)
    except Stopped:
        assert stop.asked is not None
        print(f"stopped by {stop.asked.name}; what was finished is kept. Go on with: csr run {run}", file=sys.stderr)
        raise
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)
