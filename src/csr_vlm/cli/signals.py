"""Ctrl-C and SIGTERM: finish what is in hand, say how to go on, and go."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from csr_vlm.core.progress import Advance, Reporter

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


class _Advance:
    """Counts what is finished, which is the good moment."""

    def __init__(self, advance: Advance, stop: _Stop) -> None:
        self._advance = advance
        self._stop = stop

    def __call__(self, done: int) -> None:
        self._advance(done)
        self._stop.leave_if_asked()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._advance, name)


class _Reporter:
    """Shows the progress of another, and ends the work between two of its items."""

    def __init__(self, tell: Reporter, stop: _Stop) -> None:
        self._tell = tell
        self._stop = stop

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Advance]:
        self._stop.leave_if_asked()
        with self._tell.stage(title, total) as advance:
            yield _Advance(advance, self._stop)

    def say(self, text: str) -> None:
        self._tell.say(text)


@contextmanager
def stoppable(tell: Reporter, run: Path) -> Iterator[Reporter]:
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
        yield _Reporter(tell, stop)
    except Stopped:
        assert stop.asked is not None
        print(f"stopped by {stop.asked.name}; what was finished is kept. Go on with: csr run {run}", file=sys.stderr)
        raise
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)
