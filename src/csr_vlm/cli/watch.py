"""``csr watch``: a run's progress in the terminal, read from its directory."""

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

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from csr_vlm.pipeline.status import Current, View

_LINE_EVERY = 30.0
"""Seconds between two lines about the same stage, where there is no terminal to draw on."""
_QUIET = 20.0
"""Seconds without a sign after which it is said so."""
_COLUMNS = (("generate", "search"), ("train", "train"), ("evaluate", "evaluate"))
"""The stages that take their time."""
_STILL_GOING = ("running", "waiting")


def watch(
    target: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")],
    once: Annotated[bool, typer.Option("--once", help="Show one view and leave.")] = False,
    interval: Annotated[float, typer.Option("--interval", min=0.2, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Show what a run is doing: stage, rate, time left, metrics so far, what the policy says.

    With --json one view, or a line whenever it changed. Ctrl-C leaves; the run goes on.
    Ends with the run: exit code 0 if it finished, 1 if it did not.
    Example: csr watch runs/mine
    """
    from csr_vlm.pipeline.status import Watcher

    as_json = console.mode.json
    watcher = Watcher(Run.open(target))
    if once:
        view = watcher.look()
        console.print_json(view.dump()) if as_json else _print(view)
        return
    try:
        last = _follow(watcher.look, interval, as_json)
    except KeyboardInterrupt:
        print(f"left; csr watch {target} shows it again", file=sys.stderr)
        raise typer.Exit(130) from None
    if last.state != "finished":
        print(f"hint: csr run {target} goes on with it", file=sys.stderr)
        raise typer.Exit(1)


def _follow(look: Callable[[], View], interval: float, as_json: bool) -> View:
    """Show views until the run ends; return the last one."""
    from rich.console import Console

    if as_json:
        return _follow_json(look, interval)
    output = Console(highlight=False)
    return _follow_screen(look, interval, output) if output.is_terminal else _follow_lines(look, interval)


def _looks(look: Callable[[], View], interval: float) -> Iterator[View]:
    """Yield views, the last of them the first in which nobody works any more."""
    while True:
        view = look()
        yield view
        if view.state not in _STILL_GOING:
            return
        time.sleep(interval)


def _follow_screen(look: Callable[[], View], interval: float, output: Console) -> View:
    from rich.live import Live

    with Live(console=output, auto_refresh=False) as live:
        for view in _looks(look, interval):
            live.update(_drawn(view), refresh=True)
    return view


def _follow_lines(look: Callable[[], View], interval: float) -> View:
    """Print a line when something happened, and now and then while a stage goes on."""
    told: object = None
    told_at = 0.0
    evaluated: set[int] = set()
    for view in _looks(look, interval):
        now = time.monotonic()
        happened = (view.state, view.current.title if view.current else "")
        if happened != told or now - told_at >= _LINE_EVERY:
            print(f"{time.strftime('%H:%M:%S')} {_line(view)}", flush=True)
            told, told_at = happened, now
        for number in sorted(view.metrics.keys() - evaluated):
            name = f"iteration {number}" if number else "base model"
            print(f"{time.strftime('%H:%M:%S')} {name}: {_metrics_line(view, number)}", flush=True)
        evaluated |= view.metrics.keys()
    return view


def _follow_json(look: Callable[[], View], interval: float) -> View:
    told = ""
    for view in _looks(look, interval):
        # What only says how much time has passed is no change.
        still = {**view.dump(), "left": None, "quiet_for": None}
        still["current"] = still["current"] and {**still["current"], "left": None, "seconds": None}
        if (now := json.dumps(still, sort_keys=True)) != told:
            print(json.dumps(view.dump(), ensure_ascii=False), flush=True)
            told = now
    return view


def _print(view: View) -> None:
    from rich.console import Console

    Console(highlight=False).print(_drawn(view))


def _line(view: View) -> str:
    """Say in one line where the run stands."""
    parts = [one_line(view.state)]
    if view.why:
        parts.append(one_line(view.why))
    if view.current is not None:
        parts.append(_current_line(view.current))
    if view.left is not None:
        parts.append(f"the run {duration(view.left)}")
    return ", ".join(parts)


def _current_line(current: Current) -> str:
    done = f"{current.done} of {current.total}" if current.total else str(current.done)
    parts = [f"{one_line(current.title)} {done}"]
    if current.rate:
        slow = current.rate < 1
        parts.append(f"{1 / current.rate:.1f} s each" if slow else f"{current.rate:.1f}/s")
    if current.left is not None:
        parts.append(f"{duration(current.left)} left")
    parts += [f"{name} {value:.3f}" for name, value in current.numbers.items()]
    return ", ".join(parts)


def _metrics_line(view: View, number: int) -> str:
    metrics = view.metrics[number]
    return ", ".join(
        f"{metric_spec(name).label} {metric_cell(name, metrics[name])}" for name in _shown(view) if name in metrics
    )


def _shown(view: View) -> tuple[str, ...]:
    return headline_metrics(any("chair_s" in metrics for metrics in view.metrics.values()))


def _drawn(view: View) -> RenderableType:
    """Lay a view out for a terminal; everything that a model or a file said is plain text."""
    from rich.console import Group
    from rich.text import Text

    style = {"running": "bold green", "finished": "bold green", "waiting": "bold"}.get(view.state, "bold red")
    head = Text.assemble((view.state, style), "  ", (one_line(view.run), "bold"), "  ", (one_line(view.model), "dim"))
    if view.why:
        head.append(f"\n{one_line(view.why)}")
    parts: list[RenderableType] = [head, Text("")]
    if view.current is not None:
        parts += [_bar(view), Text("")]
    elif view.state == "running":
        parts += [Text("between two stages: loading or writing", style="dim"), Text("")]
    parts.append(_table(view))
    if view.said:
        parts += [Text(""), *(Text(f"• {one_line(line)}", style="yellow") for line in view.said[-3:])]
    if view.samples:
        parts.append(Text(f"\n{one_line(view.samples[0].source).capitalize()}:", style="bold"))
        for sample in view.samples:
            parts.append(Text.assemble((f"  {one_line(sample.prompt_id)}  ", "dim"), one_line(sample.text)))
    return Group(*parts)


def _bar(view: View) -> RenderableType:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    current = view.current
    assert current is not None
    text = Text(_current_line(current))
    if view.left is not None:
        text.append(f"; the whole run about {duration(view.left)}", style="dim")
    if view.quiet_for is not None and view.quiet_for > _QUIET:
        text.append(f"; last heard of {duration(view.quiet_for)} ago", style="dim")
    bar = ProgressBar(total=current.total or None, completed=current.done, width=48, pulse=not current.total)
    return Group(text, bar)


def _table(view: View) -> RenderableType:
    """One row a policy: how long its stages took, and what was measured of it."""
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    names = _shown(view)
    for name in ("", *(title for _, title in _COLUMNS), *(metric_spec(name).label for name in names)):
        table.add_column(Text(name), justify="right" if name else "left", no_wrap=True)
    for number, done in view.stages.items():
        took = [_took(done, stage) for stage, _ in _COLUMNS]
        metrics = view.metrics.get(number, {})
        cells = [metric_cell(name, metrics[name]) if name in metrics else "" for name in names]
        table.add_row("base" if number == 0 else f"iteration {number}", *took, *cells)
    return table


def _took(done: Mapping[str, float | None], stage: str) -> str:
    if stage not in done:
        return "·"
    minutes, seconds = divmod(round(done[stage] or 0.0), 60)
    return f"{minutes}:{seconds:02d}"
