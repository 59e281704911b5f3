"""Implement ``csr compare``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import complete_run
from csr_vlm.evaluation.metrics import metric_spec, sort_metrics
from csr_vlm.store.run import Run

if TYPE_CHECKING:
    from csr_vlm.evaluation.compare import Comparison, EvaluatedPolicy
    from csr_vlm.evaluation.statistics import Difference


def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", autocompletion=complete_run, help="Run directory.")],
    run_b: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN_B", autocompletion=complete_run, help="Second run (default: base model vs. result of RUN_A)."
        ),
    ] = None,
    iteration_a: Annotated[int | None, typer.Option(min=0, help="Iteration of RUN_A; 0 is the base model.")] = None,
    iteration_b: Annotated[int | None, typer.Option(min=0, help="Iteration of RUN_B.")] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option("--fail-if", help="Rule such as 'recall < -0.01' or 'Colors right < 0'; exit code 3 if it holds."),
    ] = None,
) -> None:
    """Test whether two policies differ, prompt by prompt.

    One run: its base model and its result. Two runs: the result of each. Prints differences, intervals and p-values.

    Example: csr compare runs/d0 --fail-if 'recall < -0.01'
    """
    from csr_vlm.evaluation.compare import EvaluatedPolicy, parse_rule, triggered_rules
    from csr_vlm.evaluation.compare import compare as compare_policies

    rules = [parse_rule(rule) for rule in fail_if or ()]
    first = Run.open(run_a)
    second = first if run_b is None else Run.open(run_b)
    if iteration_a is None:
        iteration_a = 0 if run_b is None else first.final
    before = EvaluatedPolicy(first, iteration_a)
    after = EvaluatedPolicy(second, second.final if iteration_b is None else iteration_b)
    comparisons = compare_policies(before, after)
    reasons = triggered_rules(rules, comparisons)
    if console.mode.json:
        console.print_json(
            {
                "before": {"run": str(run_a), "iteration": before.iteration},
                "after": {"run": str(second.root), "iteration": after.iteration},
                "comparisons": [comparison.dump() for comparison in comparisons],
                "failed": reasons,
            }
        )
    else:
        _print(before, after, comparisons)
        console.log(f"next: csr reproduce {second.root} compares them with the paper")
    for reason in reasons:
        print(f"failed: {reason}", file=sys.stderr)
    if reasons:
        raise typer.Exit(3)


def _print(before: EvaluatedPolicy, after: EvaluatedPolicy, comparisons: Sequence[Comparison]) -> None:
    for comparison in comparisons:
        if not comparison.metrics:
            print(f"{comparison.evaluation}: no metric that is computed per prompt", file=sys.stderr)
            continue
        rows = [
            [metric_spec(name).label, *_cells(comparison.metrics[name], comparison.adjusted.get(name))]
            for name in sort_metrics(comparison.metrics)
        ]
        columns = ["", "before", "after", "change", "95 % interval", "p", "Holm"]
        console.print_table(f"{comparison.evaluation}\n{before.name}\n-> {after.name}", columns, rows)
        counts = sorted({difference.n for difference in comparison.metrics.values()}, reverse=True)
        console.log(
            f"{counts[0]} prompts, fewer for metrics that do not apply to all. p: McNemar's exact test for binary "
            "metrics, else a paired permutation test; Holm: adjusted for the number of metrics"
        )


def _cells(difference: Difference, adjusted: float | None) -> list[str]:
    def write(value: float | None, sign: str = "") -> str:
        digits = 1 if max(abs(difference.before or 0.0), abs(difference.after or 0.0)) >= 10 else 3
        return "-" if value is None else f"{value:{sign}.{digits}f}"

    interval = "-" if difference.low is None else f"{write(difference.low, '+')} to {write(difference.high, '+')}"
    tests = ["-" if p is None else f"{p:.2g}" if p >= 1e-4 else "<0.0001" for p in (difference.p, adjusted)]
    return [write(difference.before), write(difference.after), write(difference.value, "+"), interval, *tests]
