"""Write output: data to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csr_vlm.cli.sanitize import printable
from csr_vlm.core.formatting import duration
from csr_vlm.core.progress import Progress, Reporter, Silent
from csr_vlm.core.secrets import redact
from csr_vlm.evaluation.metrics import metric_spec, sort_metrics

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_PIPE_WIDTH = 10_000
"""Columns of a file or a pipe, where no name is cut to fit a screen."""
_LINE_EVERY = 30.0
"""Seconds between two lines of progress if stderr is not a terminal."""
_LOPSIDED = 1.5
"""Ratio of the two sides of an interval from which both are printed."""


@dataclass
class Mode:
    """Hold the output options of the process; :mod:`csr_vlm.cli.common` sets them from the command line."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    color: bool = True
    debug: bool = False

    def reset(self) -> None:
        """Restore the defaults; NO_COLOR (https://no-color.org) switches color off."""
        self.json = self.quiet = self.verbose = self.debug = False
        self.color = not os.environ.get("NO_COLOR")


mode = Mode()


def terminal(stderr: bool = False) -> Console:
    """Return a rich console for stdout or stderr, in the requested color mode."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, color_system="auto" if mode.color else None)


def quiet_libraries() -> None:
    """Silence progress bars, warnings and log lines of the libraries, unless --verbose is given."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if mode.verbose:
        return
    import logging
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with reporter().stage("starting", 0):
        from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


class _Bar:
    """Advance one task of a progress display."""

    def __init__(self, progress: RichProgress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._done = 0
        self._started = time.monotonic()

    def advance(self, number: int = 1) -> None:
        self._done += number
        rate = self._done / max(time.monotonic() - self._started, 1e-3)
        self._progress.update(self._task, advance=number, rate=f"{rate:.1f}/s")

    def set_total(self, total: int) -> None:
        self._progress.update(self._task, total=total)

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        pass


class _Lines:
    """Print progress line by line, for a log: every half minute, and at the end."""

    def __init__(self, title: str, total: int) -> None:
        self._title = title
        self._total = total
        self._done = self._shown = 0
        self._started = self._printed = time.monotonic()

    def advance(self, number: int = 1) -> None:
        self._done += number
        if time.monotonic() - self._printed >= _LINE_EVERY:
            self.print_line()

    def set_total(self, total: int) -> None:
        self._total = total

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        pass

    def end(self) -> None:
        if self._done != self._shown:
            self.print_line()

    def print_line(self) -> None:
        self._printed, self._shown = time.monotonic(), self._done
        seconds = self._printed - self._started
        rate = self._done / seconds if seconds else 0.0
        left = f", {duration((self._total - self._done) / rate)} left" if rate and self._done < self._total else ""
        of_total = f" of {self._total}" if self._total else ""
        print(f"{self._title}: {self._done}{of_total}, {duration(seconds)}{left}", file=sys.stderr, flush=True)


class Terminal:
    """Show each stage on stderr, as a bar with rate and time left, or as lines if stderr is not a terminal."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Progress]:
        """Show a stage of ``total`` items while the context is open."""
        console = terminal(stderr=True)
        if not console.is_terminal:
            lines = _Lines(title, total)
            yield lines
            lines.end()
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=console, transient=not total) as progress:
            task = progress.add_task(title, total=total or None, rate="")
            yield _Bar(progress, task)
            final = progress.tasks[0]
            progress.update(task, total=final.completed or 1, completed=final.completed or 1)

    def log(self, text: str) -> None:
        """Print one line to stderr."""
        print(printable(redact(text)), file=sys.stderr)


def reporter() -> Reporter:
    """Return a reporter that shows progress, or a silent one."""
    return Silent() if mode.quiet else Terminal()


def print_json(value: Any) -> None:
    """Write a JSON document to stdout."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def log(text: str) -> None:
    """Print one line to stderr, unless --quiet is given."""
    if not mode.quiet:
        print(printable(redact(text)), file=sys.stderr)


def done(*written: Path | str, then: str = "", **facts: Any) -> None:
    """End a verb: print what was written to stdout, and what to run next to stderr.

    Args:
        written: Files and folders, one per line.
        then: Next command or action.
        facts: Further values for the JSON output.
    """
    if mode.json:
        print_json({"written": [str(path) for path in written], **facts})
    else:
        for path in written:
            print(path)
    if then:
        log(f"next: {then}")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table to stdout, with the first column left-aligned and the others right-aligned."""
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(columns):
        table.add_column(Text(printable(name)), justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    output = terminal()
    if not output.is_terminal:
        output.width = _PIPE_WIDTH
    if title:
        output.print(Text(printable(title), style="italic"), soft_wrap=True)
    output.print(table)


def print_metrics(title: str, metrics_by_iteration: Mapping[int, Mapping[str, Any]]) -> None:
    """Print one row per metric and one column per iteration, where 0 is the base model."""
    columns = ["", *("base" if number == 0 else f"iteration {number}" for number in metrics_by_iteration)]
    keys = sort_metrics({key for metrics in metrics_by_iteration.values() for key in metrics})
    rows = [
        [metric_spec(key).label, *(metric_cell(key, metrics.get(key)) for metrics in metrics_by_iteration.values())]
        for key in keys
    ]
    print_table(title, columns, rows)


def metric_cell(key: str, metric: Mapping[str, Any] | None) -> str:
    """Format a metric's value and its interval: by the half-width or, if it is lopsided, by how far it goes each way.

    Example:
        >>> metric_cell("recall", {"value": 0.99, "low": 0.98, "high": 1.0})
        '0.990 ±0.010'
        >>> metric_cell("recall", {"value": 1.0, "low": 0.94, "high": 1.0})
        '1.000 -0.060'
    """
    if metric is None or metric["value"] is None:
        return "-"
    value, low, high = metric["value"], metric["low"], metric["high"]
    spec = metric_spec(key)
    digits = spec.digits if spec.digits is not None else 1 if abs(value) >= 10 else 3
    if low is None:
        return f"{value:.{digits}f}"
    above, below = high - value, value - low
    if max(above, below) <= _LOPSIDED * min(above, below):
        return f"{value:.{digits}f} ±{(high - low) / 2:.{digits}f}"
    sides = (f"{sign}{side:.{digits}f}" for sign, side in (("+", above), ("-", below)))
    return " ".join([f"{value:.{digits}f}", *(side for side in sides if float(side))])
