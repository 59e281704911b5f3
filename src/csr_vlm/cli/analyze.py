"""Implement ``csr analyze``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import RunArgument
from csr_vlm.store.run import Run


def analyze(
    target: RunArgument,
    responses: Annotated[int, typer.Option(min=2, help="Number of responses whose attention is measured.")] = 64,
    pairs: Annotated[int, typer.Option(min=2, help="Number of pairs of each iteration to score.")] = 256,
    external: Annotated[
        Path | None,
        typer.Option(help="External pairs (JSON Lines with id, image, text, chosen, rejected) to score as well."),
    ] = None,
) -> None:
    """Measure attention to the image and preference accuracy.

    Compares the base model with the result, writes RUN/analysis.json and adds a section to the report.

    Example: csr analyze runs/d0 --responses 128
    """
    run = Run.open(target)
    console.quiet_libraries()
    from csr_vlm.evaluation.introspection import analyze as analyze_run
    from csr_vlm.pipeline.stages import report as write_report

    with run.locked():
        analysis = analyze_run(run, console.reporter(), num_responses=responses, num_pairs=pairs, external=external)
        report = write_report(run)
    if console.mode.json:
        console.print_json(analysis)
        return
    attention = [
        [f"layer {number}", *(_change(layer[view]) for view in ("mass", "relative", "beyond_sinks"))]
        for number, layer in enumerate(analysis["attention"]["layers"], start=1)
    ]
    columns = ["", "weight", "relative to uniform", "relative, without sinks"]
    console.print_table(f"attention to the image, base and iteration {analysis['iteration']}", columns, attention)
    separability = [
        [f"pairs of {row['pairs']}", *(f"{row[when]['auc']['value']:.3f}" for when in ("before", "after"))]
        for row in analysis["separability"]
    ]
    columns = ["", "before training", "after"]
    console.print_table("chosen vs. rejected (AUC; 0.5 is chance)", columns, separability)
    console.done(target / "analysis.json", report, then=f"open {report}; it has a section on this now")


def _change(change: dict[str, Any]) -> str:
    return f"{change['before']:.3f} {change['after']:.3f} ({change['value']:+.3f})"
