"""Implement ``csr report``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import RunArgument
from csr_vlm.core.errors import CsrError
from csr_vlm.store.run import Run


def report(
    target: RunArgument,
    figure: Annotated[
        Path | None, typer.Option("--figure", help="Also write one SVG with the metrics and examples.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="HTML file or folder for the report (default: RUN/report.html).")
    ] = None,
) -> None:
    """Write the HTML report of a run.

    With --out elsewhere, the run is only read, so it may be read-only or in use.

    Example: csr report runs/d0 --figure result.svg
    """
    from csr_vlm.pipeline.stages import report as write_report

    run = Run.open(target)
    if figure is not None and figure.suffix.lower() != ".svg":
        raise CsrError(f"{figure} is not an SVG file", "name a file that ends in .svg")
    path = out or target / "report.html"
    if path.suffix.lower() not in (".html", ".htm"):
        path /= "report.html"
    with (
        contextlib.nullcontext() if run.is_elsewhere(path) else run.locked(),
        console.reporter().stage("writing the report", 0),
    ):
        written = [write_report(run, path)]
        if figure is not None:
            from csr_vlm.report.figure import write_figure
            from csr_vlm.world.truth import known_scene

            written.append(write_figure(run, figure, known_scene))
    console.done(*written, then=f"open {written[0]} in a browser; it works offline")
