"""Run the work items of a stage, in this process or on several.

Items are fixed before any process claims one and are named by everything they depend on. A
finished item leaves one file, written atomically, whose bytes depend on the item alone. So
the result does not depend on which process runs an item, in which order, or how often.
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
from csr_vlm.core.progress import Progress
from csr_vlm.store import files

Tally = dict[str, Counter[str]]
"""What was counted, by what it is about; tallies of different items add up."""

_MARK = ".shared"
_SETTLES = 30.0
"""Seconds until a file that one machine wrote is seen by all others of a network file system."""


class ItemResult(NamedTuple):
    """What one work item comes to."""

    amount: int
    """How far the progress moves."""
    tally: Tally


class Worker(Protocol):
    """The items of a stage, by their numbers. Doing one that is done already changes nothing."""

    def run_item(self, item: int) -> ItemResult: ...

    def close(self) -> None:
        """Let go of what it holds: models, processes."""
        ...


@dataclass(frozen=True)
class Task:
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
    """Number of work items; 0 for :meth:`Executor.run_all`."""


class Executor(Protocol):
    """Runs tasks on one process or several."""

    def map(self, task: Task, progress: Progress, log: Callable[[str], None]) -> Tally:
        """Run every item of ``task.make(root, log=..., **settings)`` once; return the sum of the tallies."""
        ...

    def run_all(self, task: Task, progress: Progress) -> Any:
        """Call ``task.make(root, processes=..., progress=..., **settings)`` in all processes at the same time.

        Returns:
            The result in this process.
        """
        ...


class LocalExecutor:
    """Runs everything in this process."""

    def map(self, task: Task, progress: Progress, log: Callable[[str], None]) -> Tally:
        tally: Tally = {}
        with closing(task.make(task.root, log=log, **task.settings)) as work:
            for item in range(task.num_items):
                done = work.run_item(item)
                add_counts(tally, done.tally)
                progress.advance(done.amount)
        return tally

    def run_all(self, task: Task, progress: Progress) -> Any:
        return task.make(task.root, processes=1, progress=progress, **task.settings)


LOCAL = LocalExecutor()


def add_counts(tally: Tally, more: Mapping[str, Mapping[str, int]]) -> None:
    """Add counts to a tally."""
    for about, counts in more.items():
        tally.setdefault(about, Counter()).update(counts)


def write_marker(root: Path) -> str:
    """Write a random token into a directory, by which other processes recognize it; return the token."""
    token = secrets.token_hex(8)
    files.write_text(root / _MARK, token)
    return token


def require_marker(root: Path, token: str, who: str, patience: float = _SETTLES) -> None:
    """Verify that this process sees the same directory as the leading process.

    Raises:
        CsrError: The token is not there after ``patience`` seconds.
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
