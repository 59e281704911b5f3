"""What the command line writes, and where."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from csr_vlm.errors import CsrError
from csr_vlm.progress import Advance, Reporter, Silent

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def quiet_libraries() -> None:
    """Keep the libraries' own bars, warnings and greetings out of the terminal."""
    import logging
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


class _Counter:
    """Advances one task of a progress display."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def __call__(self, done: int) -> None:
        self._progress.advance(self._task, done)

    def set_total(self, total: int) -> None:
        self._progress.update(self._task, total=total)


class Terminal:
    """Draws each stage as a bar with its rate and the time left, on stderr."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Advance]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(title, total=total or None)
            yield _Counter(progress, task)
            final = progress.tasks[0]
            progress.update(task, total=final.completed or 1, completed=final.completed or 1)

    def say(self, text: str) -> None:
        print(printable(text), file=sys.stderr)


def reporter(quiet: bool) -> Reporter:
    return Silent() if quiet else Terminal()


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table to stdout, the first column left and the others right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for index, name in enumerate(columns):
        table.add_column(Text(name), justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console(highlight=False).print(table)


def print_error(error: CsrError) -> None:
    print(f"error: {printable(error.message)}", file=sys.stderr)
    if error.hint:
        print(f"hint: {printable(error.hint)}", file=sys.stderr)


_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Show what would move the cursor, turn the text round or not encode by its code, such as ``\x1b``."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


METRICS: Mapping[str, str] = {
    "chair_s": "CHAIR_S",
    "chair_i": "CHAIR_I",
    "recall": "recall",
    "companion_recall": "companion recall",
    "attributes_right": "attributes right",
    "repeats": "repeats",
    "words": "words",
    "complete": "complete",
    "relevance": "R_I",
    "yes_no_present": "yes/no, present",
    "yes_no_absent": "yes/no, absent",
    "yes_no_companion": "yes/no, companion",
}
"""The world's metrics in the order people read them."""


def ordered(names: Iterable[str]) -> list[str]:
    """Sort metric names: those people read first, then the others."""
    rank = {name: place for place, name in enumerate(METRICS)}
    return sorted(names, key=lambda name: (rank.get(name, len(rank)), name))


def print_metrics(title: str, results: Mapping[int, Mapping[str, Any]]) -> None:
    """Write one row a metric and one column an iteration, 0 being the base model."""
    columns = ["", *("base" if number == 0 else f"iteration {number}" for number in results)]
    names = ordered({name for metrics in results.values() for name in metrics})
    rows = [[METRICS.get(name, name), *(_cell(metrics.get(name)) for metrics in results.values())] for name in names]
    print_table(title, columns, rows)


def _cell(metric: Mapping[str, Any] | None) -> str:
    if metric is None or metric["value"] is None:
        return "-"
    digits = 1 if metric["value"] >= 10 else 3
    if metric["low"] is None:
        return f"{metric['value']:.{digits}f}"
    half = (metric["high"] - metric["low"]) / 2
    return f"{metric['value']:.{digits}f} ±{half:.{digits}f}"
