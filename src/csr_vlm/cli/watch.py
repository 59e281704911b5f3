"""Implement ``csr watch``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from csr_vlm.cli import console
from csr_vlm.cli.console import metric_cell
from csr_vlm.cli.sanitize import one_line
from csr_vlm.core.formatting import duration
from csr_vlm.evaluation.metrics import headline_metrics, metric_spec
from csr_vlm.store.run import Run
from csr_vlm.store.stage_names import LABELS, TIMED_STAGES

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from csr_vlm.pipeline.status import CurrentStage, RunStatus

_LINE_EVERY = 30.0
"""Seconds between two lines about the same stage if stdout is not a terminal."""
_QUIET_AFTER = 20.0
"""Seconds without an update after which the display says so."""
_ACTIVE_STATES = ("running", "waiting")


def watch(
    target: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    once: Annotated[bool, typer.Option("--once", help="Show the status once and exit.")] = False,
    interval: Annotated[float, typer.Option("--interval", min=0.2, help="Seconds between two updates.")] = 2.0,
) -> None:
    """Follow a run: stage, time left, metrics and samples.

    Ctrl-C stops watching; the run continues. Ends with the run: exit code 0 if it finished, else 1. With --json, prints
    a line of JSON whenever the status changes.

    Example: csr watch runs/mine
    """
    from csr_vlm.pipeline.status import Watcher

    as_json = console.mode.json
    watcher = Watcher(Run.open(target))
    if once:
        status = watcher.read()
        console.print_json(status.dump()) if as_json else _print(status)
        return
    try:
        last = _follow(watcher.read, interval, as_json)
    except KeyboardInterrupt:
        print(f"stopped watching; csr watch {target} resumes", file=sys.stderr)
        raise typer.Exit(130) from None
    if last.state != "finished":
        print(f"hint: csr run {target} resumes the run", file=sys.stderr)
        raise typer.Exit(1)


def _follow(read: Callable[[], RunStatus], interval: float, as_json: bool) -> RunStatus:
    """Show the status until the run ends; return the last one."""
    from rich.console import Console

    if as_json:
        return _follow_json(read, interval)
    output = Console(highlight=False)
    return _follow_screen(read, interval, output) if output.is_terminal else _follow_lines(read, interval)


def _poll(read: Callable[[], RunStatus], interval: float) -> Iterator[RunStatus]:
    """Yield the status repeatedly, until no process works in the run."""
    while True:
        status = read()
        yield status
        if status.state not in _ACTIVE_STATES:
            return
        time.sleep(interval)


def _follow_screen(read: Callable[[], RunStatus], interval: float, output: Console) -> RunStatus:
    from rich.live import Live

    with Live(console=output, auto_refresh=False) as live:
        for status in _poll(read, interval):
            live.update(_render(status), refresh=True)
    return status


def _follow_lines(read: Callable[[], RunStatus], interval: float) -> RunStatus:
    """Print a line when the state or stage changes, and every half minute within a stage."""
    printed: object = None
    printed_at = 0.0
    evaluated: set[int] = set()
    for status in _poll(read, interval):
        now = time.monotonic()
        event = (status.state, status.current.title if status.current else "")
        if event != printed or now - printed_at >= _LINE_EVERY:
            print(f"{time.strftime('%H:%M:%S')} {_line(status)}", flush=True)
            printed, printed_at = event, now
        for number in sorted(status.metrics.keys() - evaluated):
            name = f"iteration {number}" if number else "base model"
            print(f"{time.strftime('%H:%M:%S')} {name}: {_metrics_line(status, number)}", flush=True)
        evaluated |= status.metrics.keys()
    return status


def _follow_json(read: Callable[[], RunStatus], interval: float) -> RunStatus:
    printed = ""
    for status in _poll(read, interval):
        # Elapsed time alone is not a change.
        untimed = {**status.dump(), "left": None, "quiet_for": None}
        untimed["current"] = untimed["current"] and {**untimed["current"], "left": None, "seconds": None}
        if (key := json.dumps(untimed, sort_keys=True)) != printed:
            print(json.dumps(status.dump(), ensure_ascii=False), flush=True)
            printed = key
    return status


def _print(status: RunStatus) -> None:
    from rich.console import Console

    Console(highlight=False).print(_render(status))


def _line(status: RunStatus) -> str:
    """Format the status as one line."""
    parts = [one_line(status.state)]
    if status.why:
        parts.append(one_line(status.why))
    if status.current is not None:
        parts.append(_current_line(status.current))
    if status.left is not None:
        parts.append(f"the run {duration(status.left)}")
    return ", ".join(parts)


def _current_line(current: CurrentStage) -> str:
    done = f"{current.done} of {current.total}" if current.total else str(current.done)
    parts = [f"{one_line(current.title)} {done}"]
    if current.rate:
        slow = current.rate < 1
        parts.append(f"{1 / current.rate:.1f} s each" if slow else f"{current.rate:.1f}/s")
    if current.left is not None:
        parts.append(f"{duration(current.left)} left")
    parts += [f"{name} {value:.3f}" for name, value in current.numbers.items()]
    return ", ".join(parts)


def _metrics_line(status: RunStatus, number: int) -> str:
    metrics = status.metrics[number]
    return ", ".join(
        f"{metric_spec(name).label} {metric_cell(name, metrics[name])}"
        for name in _metric_names(status)
        if name in metrics
    )


def _metric_names(status: RunStatus) -> tuple[str, ...]:
    known = {name for metrics in status.metrics.values() for name in metrics}
    return headline_metrics("chair_s" in known, "doubted" in known)


def _render(status: RunStatus) -> RenderableType:
    """Format the status for a terminal; control characters in text from models and files are escaped."""
    from rich.console import Group
    from rich.text import Text

    style = {"running": "bold green", "finished": "bold green", "waiting": "bold"}.get(status.state, "bold red")
    head = Text.assemble(
        (status.state, style), "  ", (one_line(status.run), "bold"), "  ", (one_line(status.model), "dim")
    )
    if status.why:
        head.append(f"\n{one_line(status.why)}")
    parts: list[RenderableType] = [head, Text("")]
    if status.current is not None:
        parts += [_bar(status), Text("")]
    elif status.state == "running":
        parts += [Text("between stages: loading or writing", style="dim"), Text("")]
    parts.append(_table(status))
    if status.said:
        parts += [Text(""), *(Text(f"• {one_line(line)}", style="yellow") for line in status.said[-3:])]
    if status.samples:
        parts.append(Text(f"\n{one_line(status.samples[0].source).capitalize()}:", style="bold"))
        for sample in status.samples:
            parts.append(Text.assemble((f"  {one_line(sample.prompt_id)}  ", "dim"), one_line(sample.text)))
    return Group(*parts)


def _bar(status: RunStatus) -> RenderableType:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    current = status.current
    assert current is not None
    text = Text(_current_line(current))
    if status.left is not None:
        text.append(f"; the whole run about {duration(status.left)}", style="dim")
    if status.quiet_for is not None and status.quiet_for > _QUIET_AFTER:
        text.append(f"; no update for {duration(status.quiet_for)}", style="dim")
    bar = ProgressBar(total=current.total or None, completed=current.done, width=48, pulse=not current.total)
    return Group(text, bar)


def _table(status: RunStatus) -> RenderableType:
    """Format one row per policy: the duration of its stages and its metrics."""
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    names = _metric_names(status)
    for name in ("", *(LABELS[stage] for stage in TIMED_STAGES), *(metric_spec(name).label for name in names)):
        table.add_column(Text(name), justify="right" if name else "left", no_wrap=True)
    for number, done in status.stages.items():
        durations = [_stage_duration(done, stage) for stage in TIMED_STAGES]
        metrics = status.metrics.get(number, {})
        cells = [metric_cell(name, metrics[name]) if name in metrics else "" for name in names]
        table.add_row("base" if number == 0 else f"iteration {number}", *durations, *cells)
    return table


def _stage_duration(done: Mapping[str, float | None], stage: str) -> str:
    if stage not in done:
        return "·"
    minutes, seconds = divmod(round(done[stage] or 0.0), 60)
    return f"{minutes}:{seconds:02d}"
