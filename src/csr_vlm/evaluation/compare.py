"""Compare two policies on the prompts that both answered, and apply stop rules to the differences.

An evaluation is stored as ``RUN/iteration-N/eval/NAME.json`` with three keys:

``protocol``  How it was measured. Two evaluations are compared only where their protocols are equal.
``metrics``   Name to value, 95 % interval and n (:class:`~csr_vlm.evaluation.statistics.Metric`).
``rows``      One per prompt, with the prompt's ``id`` and its ``tallies``: metric name to what the
              prompt adds to the metric's numerator and denominator.

To add a benchmark, write a module that returns such a document (:mod:`csr_vlm.evaluation.pope` is the
shortest example) and a command that stores it with ``files.write_checksummed(run.evaluation_path(iteration,
NAME), document)``. ``csr eval RUN``, ``csr compare`` and ``stop_if`` then work without a further
change. A benchmark that lmms-eval has needs one entry in :data:`csr_vlm.evaluation.lmms.BENCHMARKS`
instead.
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
from csr_vlm.evaluation.metrics import metric_spec
from csr_vlm.evaluation.statistics import Difference, Tally, holm, paired_difference
from csr_vlm.store.run import Run, differences

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_NOTHING: Tally = (0.0, 0.0)
_DESCRIPTIVE = "interval"
"""Key of a protocol that says how intervals were computed, not what was measured; a comparison computes its own."""


@dataclass(frozen=True)
class EvaluatedPolicy:
    """Identify a policy whose stored evaluations are compared."""

    run: Run
    iteration: int

    @property
    def name(self) -> str:
        return f"{self.run.root}, {policy_name(self.iteration)}"

    def documents(self) -> dict[str, dict[str, Any]]:
        return read_documents(self.run, self.iteration)


@dataclass(frozen=True)
class Comparison:
    """Hold the differences between two policies in one evaluation."""

    evaluation: str
    protocol: Mapping[str, Any]
    metrics: Mapping[str, Difference]
    adjusted: Mapping[str, float]
    """Holm-adjusted p-values over the metrics of the evaluation."""

    def dump(self) -> dict[str, Any]:
        rows = {name: change.dump() | {"p_adjusted": self.adjusted.get(name)} for name, change in self.metrics.items()}
        return {"evaluation": self.evaluation, "protocol": dict(self.protocol), "metrics": rows}


def policy_name(iteration: int) -> str:
    """Return the name of an iteration's policy; iteration 0 is the base model."""
    return f"iteration {iteration}" if iteration else "base model"


def evaluated_iterations(run: Run) -> list[int]:
    """List the iterations with a stored evaluation; 0 is the base model."""
    return [number for number in range(run.config.iterations + 1) if evaluation_paths(run, number)]


def evaluation_paths(run: Run, iteration: int) -> list[Path]:
    """List the files of an iteration's stored evaluations."""
    return sorted((run.iteration(iteration) / "eval").glob("*.json"))


def read_documents(run: Run, iteration: int) -> dict[str, dict[str, Any]]:
    """Read every stored evaluation of a policy, by name."""
    return {path.stem: run.stored_evaluation(iteration, path.stem) for path in evaluation_paths(run, iteration)}


def compare(before: EvaluatedPolicy, after: EvaluatedPolicy) -> list[Comparison]:
    """Compare two policies in every evaluation that both have.

    Raises:
        CsrError: They have no evaluation in common, or were measured under different protocols
            or on different prompts.
    """
    old, new = before.documents(), after.documents()
    common = sorted(old.keys() & new.keys())
    if not common:
        lacking = after if old else before
        raise CsrError(
            f"nothing to compare: {lacking.name} has no evaluation in common with the other policy",
            f"run csr eval {lacking.run.root}",
        )
    return [_compare_documents(name, old[name], new[name], before, after) for name in common]


def _compare_documents(
    name: str, old: Mapping[str, Any], new: Mapping[str, Any], before: EvaluatedPolicy, after: EvaluatedPolicy
) -> Comparison:
    _require_same_protocol(name, old["protocol"], new["protocol"])
    left, right = _tallies(name, old, before), _tallies(name, new, after)
    if left.keys() != right.keys():
        num_unpaired = len(left.keys() ^ right.keys())
        raise CsrError(
            f"{name}: {num_unpaired} prompts were answered by only one of the policies",
            "evaluate both policies on the same prompts",
        )
    names = dict.fromkeys(metric for row in left.values() for metric in row)
    metrics = {}
    for metric in names:
        ids = [key for key in left if metric in left[key]]
        # Where no prompt has the metric under both policies, it is undefined after.
        paired = [key for key in ids if metric in right[key]] or ids
        metrics[metric] = paired_difference(
            [left[key][metric] for key in paired], [right[key].get(metric, _NOTHING) for key in paired]
        )
    p_values = {metric: difference.p for metric, difference in metrics.items() if difference.p is not None}
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    return Comparison(name, old["protocol"], metrics, adjusted)


def _require_same_protocol(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    left, right = ({key: value for key, value in side.items() if key != _DESCRIPTIVE} for side in (old, new))
    differing = sorted(differences(left, right))
    if differing:
        shown = ", ".join(
            f"{key} ({lookup(old, key, 'missing')} vs. {lookup(new, key, 'missing')})" for key in differing[:4]
        )
        raise CsrError(
            f"{name} was measured under different protocols: {shown}",
            "evaluate both with the same settings; csr eval RUN --again measures a run's policies with its config",
        )


def lookup(settings: Any, dotted: str, default: Any = None) -> Any:
    """Return the value of a dotted key in nested mappings; ``default`` where it is missing.

    Example:
        >>> lookup({"method": {"lambda": 0.9}}, "method.lambda")
        0.9
    """
    for part in dotted.split("."):
        settings = settings.get(part, default) if isinstance(settings, Mapping) else default
    return settings


def _tallies(name: str, document: Mapping[str, Any], policy: EvaluatedPolicy) -> dict[str, dict[str, Any]]:
    """Return the tallies of each prompt, by prompt id."""
    rows = document.get("rows", [])
    if not rows or any("tallies" not in row for row in rows):
        raise CsrError(
            f"the {name} evaluation of {policy.name} has no per-prompt tallies",
            f"an earlier version wrote it; measure it again: csr eval {policy.run.root} --again",
        )
    return {row["id"]: row["tallies"] for row in rows}


@dataclass(frozen=True)
class StopRule:
    """Represent a condition on a difference, such as ``recall < -0.01``."""

    text: str
    name: str
    """``[EVALUATION/]METRIC``; without an evaluation it applies to every evaluation with the metric."""
    field: str
    """``value``, or a bound of its interval: ``low`` or ``high``."""
    holds: Callable[[float], bool]


def parse_rule(text: str) -> StopRule:
    """Parse ``[EVALUATION/]METRIC[.low|.high] OPERATOR NUMBER``, a condition on after - before.

    ``recall < -0.01`` tests the difference itself; ``recall.high < -0.01`` tests the upper bound
    of its interval, so it triggers only where the drop is statistically significant. METRIC is a key
    or a name as tables print it; :func:`named_metrics` looks it up.

    Raises:
        CsrError: The text is not a valid rule.
    """
    match = re.fullmatch(STOP_RULE, text.strip())
    if match is None:
        raise CsrError(f"{text!r} is not a valid rule", "write METRIC OPERATOR NUMBER, such as 'recall < -0.01'")
    compares, bound = _OPERATORS[match["operator"]], float(match["bound"])
    field = match["field"] or "value"
    return StopRule(text.strip(), match["name"], field, lambda value: compares(value, bound))


def named_metrics(rule: StopRule, measured: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the measured metrics, as (evaluation, key), that a rule names.

    A name is a key or a label of :mod:`csr_vlm.evaluation.metrics`, in any case, with or without what
    a table adds in parentheses. A name that is spelled exactly like a key is that key.

    Raises:
        CsrError: No metric has the name, or metrics of different keys have it.
    """
    exact = [(e, key) for e, key in measured if rule.name in (key, f"{e}/{key}")]
    found = exact or [(e, key) for e, key in measured if _plain(rule.name) in _names(e, key)]
    if len({key for _, key in found}) == 1:
        return found
    if found:
        raise CsrError(f"the rule {rule.text!r} names {len(found)} metrics", f"expected one of: {_listed(found)}")
    raise CsrError(
        f"the rule {rule.text!r} names a metric that was not measured", f"expected one of: {_listed(measured)}"
    )


def measured_metrics(documents: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """List the metrics, as (evaluation, key), that any prompt of the stored evaluations has a tally of."""
    return [
        (name, metric)
        for name, document in documents.items()
        for metric in dict.fromkeys(key for row in document.get("rows", []) for key in row.get("tallies", {}))
    ]


def _plain(name: str) -> str:
    """Drop a note in parentheses from the end of a name, and its case."""
    return re.sub(r"\s*\([^()]*\)$", "", name).casefold()


def _names(evaluation: str, key: str) -> set[str]:
    names = (key, metric_spec(key).label)
    return {_plain(f"{prefix}{name}") for name in names for prefix in ("", f"{evaluation}/")}


def _listed(metrics: Sequence[tuple[str, str]]) -> str:
    labels = {key: metric_spec(key).label for _, key in metrics}
    return ", ".join(
        f"{evaluation}/{key}" + (f" ({labels[key]})" if labels[key] != key else "") for evaluation, key in metrics
    )


def triggered_rules(rules: Sequence[StopRule], comparisons: Sequence[Comparison]) -> list[str]:
    """Describe each rule that fails: the rule, the evaluation and the difference.

    A rule fails where its condition holds, and where its metric had a value before and has none after: a
    policy that says nothing must not pass.

    Raises:
        CsrError: A rule names no measured metric, or several.
    """
    changes = {(c.evaluation, key): difference for c in comparisons for key, difference in c.metrics.items()}
    reasons = []
    for rule in rules:
        for evaluation, key in named_metrics(rule, list(changes)):
            difference = changes[evaluation, key]
            value = getattr(difference, rule.field)
            if difference.became_undefined or (value is not None and rule.holds(value)):
                reasons.append(f"{rule.text}: {evaluation} {describe(key, difference)}")
    return reasons


def describe(metric: str, difference: Difference) -> str:
    """Format a difference as one line of text."""
    if difference.became_undefined:
        return f"{metric} was {difference.before:.4g} and is undefined now: nothing is left to compute it from"
    if difference.value is None or difference.before is None or difference.after is None:
        return f"{metric} has no value"
    interval = (
        "no interval"
        if difference.low is None or difference.high is None
        else f"95 % interval {difference.low:+.4f} to {difference.high:+.4f}"
    )
    return f"{metric} went from {difference.before:.4g} to {difference.after:.4g} ({difference.value:+.4f}, {interval})"
