"""``csr eval RUN`` and ``csr compare``: what was measured, and whether it changed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import RunArgument, complete_run
from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.metrics import metric_spec, sort_metrics
from csr_vlm.store.run import Run

if TYPE_CHECKING:
    from csr_vlm.evaluation.compare import Comparison, EvaluatedPolicy
    from csr_vlm.evaluation.statistics import Difference


def measure(
    target: RunArgument,
    again: Annotated[bool, typer.Option("--again", help="Measure anew what the configuration asks for.")] = False,
) -> None:
    """Print everything that was measured of base and iterations; measure what is missing.

    Example: csr eval runs/d0
    """
    opened = Run.open(target)
    console.quiet_libraries()
    from csr_vlm.evaluation.compare import evaluated_iterations, read_documents
    from csr_vlm.pipeline import stages

    with opened.locked():
        for number in range(opened.last_trained + 1):
            stages.evaluate(opened, number, console.reporter(), again)
    found = {number: read_documents(opened, number) for number in evaluated_iterations(opened)}
    if not found:
        raise CsrError(f"nothing is measured in {target}", "set evaluation in its recipe, or see csr eval --help")
    if console.mode.json:
        listed = [
            {"iteration": number, "evaluation": name, "metrics": document["metrics"], "protocol": document["protocol"]}
            for number, documents in found.items()
            for name, document in documents.items()
        ]
        console.print_json({"run": str(target), "measured": listed})
        return
    for name in sorted({name for documents in found.values() for name in documents}):
        documents = {number: mine[name] for number, mine in found.items() if name in mine}
        console.print_metrics(
            f"{name}, with 95 % intervals", {number: document["metrics"] for number, document in documents.items()}
        )
        for protocol in _distinct([document["protocol"] for document in documents.values()]):
            console.log(f"{name}: " + ", ".join(f"{key} {value}" for key, value in protocol.items()))
    console.log(f"next: csr compare {target} tests the differences prompt by prompt")


def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", autocompletion=complete_run, help="Directory of a run.")],
    run_b: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN_B", autocompletion=complete_run, help="Another; without it, RUN_A's base and its result."
        ),
    ] = None,
    iteration_a: Annotated[int | None, typer.Option(min=0, help="Of RUN_A; 0 is the base model.")] = None,
    iteration_b: Annotated[int | None, typer.Option(min=0, help="Of RUN_B.")] = None,
    fail_if: Annotated[
        list[str] | None, typer.Option("--fail-if", help="Such as 'recall < -0.01'; exit code 3 if it holds.")
    ] = None,
) -> None:
    """Compare two policies prompt by prompt: differences, intervals and tests.

    One run: its base model against its result. Two runs: the result of each.
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
    found = compare_policies(before, after)
    reasons = triggered_rules(rules, found)
    if console.mode.json:
        console.print_json(
            {
                "before": {"run": str(run_a), "iteration": before.iteration},
                "after": {"run": str(second.root), "iteration": after.iteration},
                "comparisons": [comparison.dump() for comparison in found],
                "failed": reasons,
            }
        )
    else:
        _print(before, after, found)
        console.log(f"next: csr reproduce {second.root} sets the numbers beside the paper's")
    for reason in reasons:
        print(f"failed: {reason}", file=sys.stderr)
    if reasons:
        raise typer.Exit(3)


def _print(before: EvaluatedPolicy, after: EvaluatedPolicy, found: Sequence[Comparison]) -> None:
    for comparison in found:
        if not comparison.metrics:
            print(f"{comparison.evaluation}: no metric that prompts have a share in", file=sys.stderr)
            continue
        rows = [
            [metric_spec(name).label, *_cells(comparison.metrics[name], comparison.adjusted.get(name))]
            for name in sort_metrics(comparison.metrics)
        ]
        columns = ["", "before", "after", "change", "95 % interval", "p", "Holm"]
        console.print_table(f"{comparison.evaluation}\n{before.name}\n-> {after.name}", columns, rows)
        counts = sorted({found.n for found in comparison.metrics.values()}, reverse=True)
        console.log(
            f"{counts[0]} prompts, fewer where a metric does not apply to all. p: McNemar's exact test where a prompt "
            "is right or wrong, else a paired permutation test; Holm: adjusted for the number of metrics"
        )


def _cells(found: Difference, adjusted: float | None) -> list[str]:
    def write(value: float | None, sign: str = "") -> str:
        digits = 1 if max(abs(found.before or 0.0), abs(found.after or 0.0)) >= 10 else 3
        return "-" if value is None else f"{value:{sign}.{digits}f}"

    interval = "-" if found.low is None else f"{write(found.low, '+')} to {write(found.high, '+')}"
    tests = ["-" if p is None else f"{p:.2g}" if p >= 1e-4 else "<0.0001" for p in (found.p, adjusted)]
    return [write(found.before), write(found.after), write(found.value, "+"), interval, *tests]


def _distinct(protocols: Sequence[Any]) -> list[Any]:
    return [protocol for place, protocol in enumerate(protocols) if protocol not in protocols[:place]]
