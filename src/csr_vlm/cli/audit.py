"""Implement ``csr audit``."""

from __future__ import annotations

from typing import Annotated

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import GeneratedIteration, RunArgument, last_generated
from csr_vlm.config.load import load_config
from csr_vlm.store.run import Run


def audit(
    target: RunArgument,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Check the pairs that these settings derive.")
    ] = None,
    iteration: GeneratedIteration = None,
) -> None:
    """Check whether an iteration's pairs are worth training on.

    Label-free quality metrics give a verdict: go, warn or stop. The exit code is 3 for stop.

    Example: csr audit runs/q method.lambda=0
    """
    from csr_vlm.method import audit as quality
    from csr_vlm.pipeline import gates

    run = Run.open(target)
    number = iteration or last_generated(run)
    config = load_config(None, overrides or (), base=run.config.dump())
    metrics = gates.pair_metrics(run, number, config, console.reporter())
    checks = quality.pair_checks(metrics, {} if overrides else gates.first_pair_metrics(run, number))
    if not overrides and run.is_done(number, "evaluate"):
        response_metrics, response_checks = gates.response_checks(run, number)
        metrics |= response_metrics
        checks += response_checks
    verdict = quality.worst_verdict(checks)
    if console.mode.json:
        console.print_json(
            {"iteration": number, "verdict": verdict.value, "metrics": metrics, "checks": quality.dump(checks)}
        )
    else:
        verdicts = {check.metric: check.verdict.value for check in checks}
        bounds = {name: str(bound) for name, bound in {**quality.PAIR_BOUNDS, **quality.RESPONSE_BOUNDS}.items()}
        rows = [
            [metric, f"{value:.3f}", verdicts.get(metric, ""), bounds.get(metric, "") if metric in verdicts else ""]
            for metric, value in metrics.items()
        ]
        rows += [[check.metric, "-", check.verdict.value, ""] for check in checks if check.value is None]
        console.print_table(f"iteration {number}: {verdict.value}", ["metric", "value", "verdict", "bounds"], rows)
        for check in checks:
            if check.reason:
                print(f"{check.verdict.value}: {check.reason}")
        if verdict is quality.Verdict.STOP:
            console.log(f"next: csr audit {target} KEY=VALUE tries other settings; csr sweep {target} trains on them")
        elif run.is_done(number, "train"):
            console.log(f"next: csr compare {target}; csr chat {target} PICTURE")
        else:
            console.log(f"next: csr train {target}")
    if verdict is quality.Verdict.STOP:
        raise typer.Exit(3)
