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
    checks = gates.pair_checks(run, metrics, {} if overrides else gates.first_pair_metrics(run, number))
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
        shown = {check.metric: quality.shown_verdict(check.verdict.value, check.n) for check in checks}
        numbers = {check.metric: str(check.n) for check in checks if check.n is not None}
        num_few = list(shown.values()).count(quality.TOO_FEW)
        bounds = {name: str(bound) for name, bound in {**quality.PAIR_BOUNDS, **quality.RESPONSE_BOUNDS}.items()}
        rows = [
            [
                metric,
                f"{value:.3f}",
                numbers.get(metric, ""),
                shown.get(metric, ""),
                bounds.get(metric, "") if metric in shown else "",
            ]
            for metric, value in metrics.items()
        ]
        undefined = [check for check in checks if check.value is None]
        rows += [[check.metric, "-", numbers.get(check.metric, ""), check.verdict.value, ""] for check in undefined]
        title = f"iteration {number}: {verdict.value}"
        if num_few:
            title += f"; {num_few} of {len(checks)} checks had fewer than {quality.FEWEST} cases, which is too few"
        console.print_table(title, ["metric", "value", "n", "verdict", "bounds"], rows)
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
