"""``csr analyse``: what changed inside the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import RunArgument
from csr_vlm.store.run import Run


def analyze(
    target: RunArgument,
    responses: Annotated[int, typer.Option(min=2, help="Responses whose attention is read.")] = 64,
    pairs: Annotated[int, typer.Option(min=2, help="Pairs of each iteration that policies are asked about.")] = 256,
    external: Annotated[
        Path | None, typer.Option(help="Pairs from elsewhere: JSON Lines with id, image, text, chosen, rejected.")
    ] = None,
) -> None:
    """Ask base and result where they look and what they prefer; RUN/analysis.json and a part of the report.

    Example: csr analyse runs/d0 --responses 128
    """
    opened = Run.open(target)
    console.quiet_libraries()
    from csr_vlm.evaluation.introspection import analyze as analyze_run
    from csr_vlm.pipeline.stages import report as write_report

    with opened.locked():
        found = analyze_run(opened, console.reporter(), num_responses=responses, num_pairs=pairs, external=external)
        report = write_report(opened)
    if console.mode.json:
        console.print_json(found)
        return
    rows = [
        [f"layer {number}", *(_change(layer[view]) for view in ("mass", "relative", "beyond_sinks"))]
        for number, layer in enumerate(found["attention"]["layers"], start=1)
    ]
    columns = ["", "weight", "times even share", "the same without sinks"]
    console.print_table(f"attention to the image, base and iteration {found['iteration']}", columns, rows)
    told = [
        [f"pairs of {row['pairs']}", *(f"{row[when]['auc']['value']:.3f}" for when in ("before", "after"))]
        for row in found["separability"]
    ]
    console.print_table("chosen told from rejected (AUC; 0.5 is chance)", ["", "before training", "after"], told)
    console.done(target / "analysis.json", report, then=f"open {report}: it has a part about this now")


def _change(found: dict[str, Any]) -> str:
    return f"{found['before']:.3f} {found['after']:.3f} ({found['value']:+.3f})"
