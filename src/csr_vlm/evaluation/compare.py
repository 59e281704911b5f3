"""Comparing two policies on the prompts that both answered, and rules about the outcome.

An evaluation is stored as ``RUN/iteration-N/eval/NAME.json`` with ``protocol``, ``metrics`` and
``rows``; a row has the prompt's ``id`` and its ``tallies``, what it adds to each metric. Nothing
here knows what is measured, so any evaluation in that form can be compared.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csr_vlm.config.schema import STOP_RULE
from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.statistics import Difference, holm, paired_difference
from csr_vlm.store import files
from csr_vlm.store.run import Run, differences

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Measured:
    """A policy of a run whose evaluations are compared."""

    run: Run
    iteration: int

    @property
    def name(self) -> str:
        return f"{self.run.root}, {policy_name(self.iteration)}"

    def documents(self) -> dict[str, dict[str, Any]]:
        return read_documents(self.run, self.iteration)


@dataclass(frozen=True)
class Comparison:
    """The differences of one evaluation, metric by metric."""

    evaluation: str
    protocol: Mapping[str, Any]
    metrics: Mapping[str, Difference]
    adjusted: Mapping[str, float]
    """Holm's p-values over the metrics of the evaluation."""

    def dump(self) -> dict[str, Any]:
        rows = {name: found.dump() | {"p_adjusted": self.adjusted.get(name)} for name, found in self.metrics.items()}
        return {"evaluation": self.evaluation, "protocol": dict(self.protocol), "metrics": rows}


def policy_name(iteration: int) -> str:
    return f"iteration {iteration}" if iteration else "base model"


def evaluated(run: Run) -> list[int]:
    """List the iterations with a stored evaluation; 0 is the base model."""
    return [number for number in range(run.config.iterations + 1) if documents_of(run, number)]


def documents_of(run: Run, iteration: int) -> list[Path]:
    return sorted((run.iteration(iteration) / "eval").glob("*.json"))


def read_documents(run: Run, iteration: int) -> dict[str, dict[str, Any]]:
    """Read every stored evaluation of a policy, by name."""
    return {path.stem: files.read_json(path) for path in documents_of(run, iteration)}


def compare(before: Measured, after: Measured) -> list[Comparison]:
    """Compare two policies in every evaluation that both have.

    Raises:
        CsrError: They share none, or were measured under different protocols or on different prompts.
    """
    old, new = before.documents(), after.documents()
    shared = sorted(old.keys() & new.keys())
    if not shared:
        poorer = after if old else before
        raise CsrError(
            f"there is nothing to compare: {poorer.name} has no evaluation that the other has",
            f"measure it: csr eval {poorer.run.root}",
        )
    return [_compared(name, old[name], new[name], before, after) for name in shared]


def _compared(
    name: str, old: Mapping[str, Any], new: Mapping[str, Any], before: Measured, after: Measured
) -> Comparison:
    _require_one_protocol(name, old["protocol"], new["protocol"])
    left, right = _tallies(name, old, before), _tallies(name, new, after)
    if left.keys() != right.keys():
        missing = len(left.keys() ^ right.keys())
        raise CsrError(
            f"{name}: {missing} prompts were answered by one policy only", "measure both on the same prompts"
        )
    names = dict.fromkeys(metric for row in left.values() for metric in row)
    metrics = {}
    for metric in names:
        both = [key for key in left if metric in left[key] and metric in right[key]]
        if both:
            metrics[metric] = paired_difference([left[k][metric] for k in both], [right[k][metric] for k in both])
    tested = {metric: found.p for metric, found in metrics.items() if found.p is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    return Comparison(name, old["protocol"], metrics, adjusted)


def _require_one_protocol(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    differing = sorted(differences(dict(old), dict(new)))
    if differing:
        shown = ", ".join(f"{key} ({_at(old, key)} against {_at(new, key)})" for key in differing[:4])
        raise CsrError(
            f"{name} was measured under different protocols: {shown}",
            "measure both alike; csr eval RUN --again measures a run's policies under its configuration",
        )


def _at(protocol: Mapping[str, Any], dotted: str) -> Any:
    value: Any = protocol
    for part in dotted.split("."):
        value = value.get(part, "nothing") if isinstance(value, Mapping) else "nothing"
    return value


def _tallies(name: str, document: Mapping[str, Any], policy: Measured) -> dict[str, dict[str, Any]]:
    rows = document.get("rows", [])
    if not rows or any("tallies" not in row for row in rows):
        raise CsrError(
            f"the {name} evaluation of {policy.name} does not say what each prompt adds to the metrics",
            f"an earlier version wrote it; measure again: csr eval {policy.run.root} --again",
        )
    return {row["id"]: row["tallies"] for row in rows}


@dataclass(frozen=True)
class Rule:
    """A condition on a difference, such as ``recall < -0.01``."""

    text: str
    evaluation: str | None
    metric: str
    field: str
    """``value``, or an end of its interval: ``low``, ``high``."""
    holds: Callable[[float], bool]


def parse_rule(text: str) -> Rule:
    """Read ``[EVALUATION/]METRIC[.low|.high] OPERATOR NUMBER``; the number is a difference, after - before.

    ``recall < -0.01`` looks at the difference itself; ``recall.high < -0.01`` at the upper end of
    its interval, so it holds only where chance is ruled out.

    Raises:
        CsrError: The text is no rule.
    """
    match = re.fullmatch(STOP_RULE, text.strip())
    if match is None:
        raise CsrError(f"{text!r} is not a rule", "write METRIC OPERATOR NUMBER, such as 'recall < -0.01'")
    compares, bound = _OPERATORS[match["operator"]], float(match["bound"])
    field = match["field"] or "value"
    return Rule(text.strip(), match["evaluation"], match["metric"], field, lambda value: compares(value, bound))


def broken_rules(rules: Sequence[Rule], comparisons: Sequence[Comparison]) -> list[str]:
    """Say of each rule that holds, where and by how much.

    Raises:
        CsrError: A rule names a metric that was not measured.
    """
    reasons = []
    for rule in rules:
        concerned = [
            (c.evaluation, c.metrics[rule.metric])
            for c in comparisons
            if rule.metric in c.metrics and rule.evaluation in (None, c.evaluation)
        ]
        if not concerned:
            known = ", ".join(f"{c.evaluation}/{metric}" for c in comparisons for metric in c.metrics)
            raise CsrError(f"the rule {rule.text!r} names a metric that was not measured", f"measured are {known}")
        for evaluation, found in concerned:
            value = getattr(found, rule.field)
            if value is not None and rule.holds(value):
                reasons.append(f"{rule.text}: {evaluation} {describe(rule.metric, found)}")
    return reasons


def describe(metric: str, found: Difference) -> str:
    """Write a difference as one line of text."""
    if found.value is None or found.before is None or found.after is None:
        return f"{metric} has no value"
    return (
        f"{metric} went from {found.before:.4g} to {found.after:.4g} "
        f"({found.value:+.4f}, 95 % interval {found.low:+.4f} to {found.high:+.4f})"
    )
