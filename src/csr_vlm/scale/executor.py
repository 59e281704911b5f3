"""Run the work items of a stage, in this process or on several.

The items of a task are fixed before any process claims one, and an item's output is named by
everything it depends on. A finished item leaves one file, which is written atomically and whose
bytes depend on the item alone. So the result does not depend on which process runs an item, in
which order, or how often.

To add an executor, implement :class:`Executor` in a module of its own, preferably as a context
manager like :func:`csr_vlm.scale.torchrun.torchrun_executor`, and yield it in
``csr_vlm.cli.executors.executor_for``. ``map`` must run every item at least once and add up the
counts of each item exactly once; it should call :func:`write_marker` in the leading process and
:func:`require_marker` in every process on another machine. An executor without distributed
training inherits ``run_all`` from :class:`LocalExecutor`. ``tests/unit/test_scale.py`` and
``tests/ray`` show what to test: the ledger has the same bytes as with one process, also after a
process was killed.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Progress
from csr_vlm.store import files

Counts = dict[str, Counter[str]]
"""Counters by name, such as ``{"statuses": {"top": 2}}``; those of different items are added up."""

_MARKER_FILE = ".shared"
_MARKER_TIMEOUT = 30.0
"""Seconds until a file that one machine wrote is visible on all others of a network file system."""


class ItemResult(NamedTuple):
    """Hold the result of one work item."""

    num_finished: int
    """Number by which the progress advances."""
    counts: Counts


class Worker(Protocol):
    """Run the items of a stage by their indices. Running a finished item again changes nothing.

    A worker that can work on several items at once has ``run_items`` as well; see :func:`results_of`.
    """

    def run_item(self, item: int) -> ItemResult:
        """Run one item, from 0 to the task's ``num_items`` - 1."""
        ...

    def close(self) -> None:
        """Release models and processes."""
        ...


class StreamingWorker(Worker, Protocol):
    """Run items as one stream."""

    def run_items(self, items: Iterator[int]) -> Iterator[ItemResult]:
        """Take items whenever there is room for another, and yield a result for each, in any order."""
        ...


def results_of(worker: Worker, items: Iterator[int]) -> Iterator[ItemResult]:
    """Run items and yield their results; an item is taken from the iterator, and so claimed, when it begins."""
    run_items: Callable[[Iterator[int]], Iterator[ItemResult]] | None = getattr(worker, "run_items", None)
    return map(worker.run_item, items) if run_items is None else run_items(items)


@dataclass(frozen=True)
class Task:
    """Describe work as plain data, so that it can be sent to other processes and machines."""

    target: Callable[..., Any]
    """Worker class for :meth:`Executor.map`, or function for :meth:`Executor.run_all`, at the top level of a module.
    It is called with ``root``, the settings as keywords, and the keywords that the executor's method adds."""
    root: Path
    """Directory of the run."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    num_items: int = 0
    """Number of work items; 0 for :meth:`Executor.run_all`."""


class Executor(Protocol):
    """Run tasks on one process or several."""

    def map(self, task: Task, progress: Progress, log: Callable[[str], None]) -> Counts:
        """Run every item of the worker ``task.target(root, log=..., **settings)``; return the summed counts.

        Raises:
            CsrError: An item failed, or a process was lost.
        """
        ...

    def run_all(self, task: Task, progress: Progress) -> Any:
        """Call ``task.target(root, processes=..., progress=..., **settings)`` in all processes at the same time.

        Returns:
            The result in this process.

        Raises:
            CsrError: A call failed, or a process was lost.
        """
        ...


class LocalExecutor:
    """Run everything in this process."""

    def map(self, task: Task, progress: Progress, log: Callable[[str], None]) -> Counts:
        counts: Counts = {}
        with closing(task.target(task.root, log=log, **task.settings)) as worker:
            for result in results_of(worker, iter(range(task.num_items))):
                add_counts(counts, result.counts)
                progress.advance(result.num_finished)
        return counts

    def run_all(self, task: Task, progress: Progress) -> Any:
        return task.target(task.root, processes=1, progress=progress, **task.settings)


LOCAL = LocalExecutor()


def add_counts(total: Counts, counts: Mapping[str, Mapping[str, int]]) -> None:
    """Add counts to a total, in place; counters that are zero are kept."""
    for name, counter in counts.items():
        total.setdefault(name, Counter()).update(counter)


def discard_log(text: str) -> None:
    """Ignore a log line, in a process other than the leading one."""


def write_marker(root: Path) -> str:
    """Write a random token to a directory, by which other processes recognize it; return the token."""
    token = secrets.token_hex(8)
    files.write_text(root / _MARKER_FILE, token)
    return token


def require_marker(root: Path, token: str, process: str, timeout: float = _MARKER_TIMEOUT) -> None:
    """Check that this process sees the same directory as the leading process.

    Args:
        root: Directory of the run.
        token: Token that :func:`write_marker` returned in the leading process.
        process: Name of this process, for the message.
        timeout: Seconds to wait for the token.

    Raises:
        CsrError: The token is not in the directory after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while not _contains(root / _MARKER_FILE, token):
        if time.monotonic() > deadline:
            raise CsrError(
                f"{process} sees a different {root} than the leading process",
                "put the run, the models and the images on a file system that all machines share, at the same path",
            )
        time.sleep(0.2)


def _contains(path: Path, token: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == token
    except OSError:
        return False
