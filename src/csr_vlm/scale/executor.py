"""Who does the work items of a stage: this process alone, or several together.

Items are cut before anyone takes them, and are named by what they depend on; an item that
is done leaves one file, written atomically, whose bytes depend on the item alone. So it
makes no difference who does an item, in which order, or how often.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Advance
from csr_vlm.store import files

Tally = dict[str, Counter[str]]
"""What was counted, by what it is about; tallies of different items add up."""

_MARK = ".shared"
_SETTLES = 30.0
"""Seconds until a file that one machine wrote is seen by all others of a network file system."""


class Done(NamedTuple):
    """What one work item comes to."""

    amount: int
    """How far the progress moves."""
    tally: Tally


class Work(Protocol):
    """The items of a stage, by their numbers. Doing one that is done already changes nothing."""

    def do(self, item: int) -> Done: ...

    def close(self) -> None:
        """Let go of what it holds: models, processes."""
        ...


@dataclass(frozen=True)
class Job:
    """Names some work in plain data, so that other processes and machines can be told of it.

    ``make`` is a class or function at the top of a module. It is called with the run's
    directory and the settings, and with one more argument that each way to run it gives:
    what tells a line (:meth:`Crew.spread`), or how many processes there are and what counts
    (:meth:`Crew.together`).
    """

    make: Callable[..., Any]
    root: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    num_items: int = 0
    """How many to spread."""


class Crew(Protocol):
    """One process or several that do a job."""

    def spread(self, job: Job, advance: Advance, say: Callable[[str], None]) -> Tally:
        """Do every item of ``job.make(root, say=..., **settings)`` once; return the sum of the tallies."""
        ...

    def together(self, job: Job, advance: Advance) -> Any:
        """Call ``job.make(root, processes=..., advance=..., **settings)`` in all processes at the same time.

        Returns:
            What it returned here.
        """
        ...


class Alone:
    """One process does everything."""

    def spread(self, job: Job, advance: Advance, say: Callable[[str], None]) -> Tally:
        tally: Tally = {}
        with closing(job.make(job.root, say=say, **job.settings)) as work:
            for item in range(job.num_items):
                done = work.do(item)
                add_up(tally, done.tally)
                advance(done.amount)
        return tally

    def together(self, job: Job, advance: Advance) -> Any:
        return job.make(job.root, processes=1, advance=advance, **job.settings)


ALONE = Alone()


def add_up(tally: Tally, more: Mapping[str, Mapping[str, int]]) -> None:
    """Add counts to a tally."""
    for about, counts in more.items():
        tally.setdefault(about, Counter()).update(counts)


def leave_mark(root: Path) -> str:
    """Leave a word in a directory by which other processes recognise it; return the word."""
    token = secrets.token_hex(8)
    files.write_text(root / _MARK, token)
    return token


def require_mark(root: Path, token: str, who: str, patience: float = _SETTLES) -> None:
    """Refuse a directory that is another one than that of the process which leads.

    Raises:
        CsrError: The word is not there after ``patience`` seconds.
    """
    deadline = time.monotonic() + patience
    while not _holds(root / _MARK, token):
        if time.monotonic() > deadline:
            raise CsrError(
                f"{who} sees another {root} than the process that leads the run",
                "put the run, the models and the images on a file system that all machines share, at the same path",
            )
        time.sleep(0.2)


def _holds(path: Path, token: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == token
    except OSError:
        return False
