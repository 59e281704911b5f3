"""Read a run's stored evaluations for the report, policy by policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from csr_vlm.evaluation.metrics import METRICS, MetricSpec, headline_metrics, metric_spec
from csr_vlm.evaluation.statistics import Metric, paired_difference
from csr_vlm.store.run import Run

_EVALUATIONS = ("world", "chair", "heldout")
"""Evaluations in order of preference: those that know the objects in the images come first."""
_CHARTED = {
    True: {"chair_s", "chair_i", "recall", "repeats", "words", "relevance", "doubted"},
    False: {"relevance", "sentences", "repeats", "words", "complete", "doubted"},
}
"""Keys of the charted metrics, by whether the objects in the images are known."""

MetricsByIteration = Mapping[int, Mapping[str, Metric]]
"""Iteration (0 is the base model) to metric key to value and interval."""


@dataclass(frozen=True)
class Evaluation:
    """Hold one evaluation of every policy that has it, and its rows for the first and the last policy."""

    name: str
    metrics: MetricsByIteration
    protocol: Mapping[str, Any]
    before: Sequence[Mapping[str, Any]]
    after: Sequence[Mapping[str, Any]]
    """Empty if only one policy is evaluated."""
    final: int | None = None
    """The iteration that the run returns, if the run was stopped early."""
    excluded: Sequence[int] = ()
    """Iterations evaluated under a different protocol from the first."""

    @property
    def truth_known(self) -> bool:
        """Check whether the evaluation knows the objects in the images, so that it counts hallucinations."""
        return self.name != "heldout"

    @property
    def by_claim(self) -> bool:
        """Check whether the evidence for claims of the first and of the last policy is known."""
        return all(metric.value is not None for metric in self.endpoints("doubted"))

    @property
    def headline(self) -> list[MetricSpec]:
        """List the metrics at the top of the report."""
        return [metric_spec(key) for key in headline_metrics(self.truth_known, self.by_claim)]

    @property
    def charted(self) -> list[MetricSpec]:
        """List the metrics that get a chart."""
        keys = _CHARTED[self.truth_known] & self.keys
        return [spec for key, spec in METRICS.items() if key in keys]

    @property
    def keys(self) -> set[str]:
        """Return the keys of all metrics of all policies."""
        return {key for metrics in self.metrics.values() for key in metrics}

    @property
    def first(self) -> int:
        """Return the first evaluated iteration, usually 0."""
        return min(self.metrics)

    @property
    def last(self) -> int:
        """Return the iteration that the report compares with the first."""
        return max(self.metrics) if self.final is None else self.final

    def metric(self, iteration: int, key: str) -> Metric:
        """Return a metric of a policy; without a value if it was not measured."""
        return self.metrics[iteration].get(key, Metric(None, None, None, 0))

    def endpoints(self, key: str) -> tuple[Metric, Metric]:
        """Return a metric of the first and of the last policy."""
        return self.metric(self.first, key), self.metric(self.last, key)


def read_evaluation(run: Run) -> Evaluation | None:
    """Read the most informative evaluation of a run; None if there is none."""
    evaluations = (read_named_evaluation(run, name) for name in _EVALUATIONS)
    return next((evaluation for evaluation in evaluations if evaluation is not None), None)


def read_named_evaluation(run: Run, name: str) -> Evaluation | None:
    """Read one evaluation of every policy; None if it was not run."""
    paths = {number: run.evaluation_path(number, name) for number in range(run.config.iterations + 1)}
    stored = {number: run.stored_evaluation(number, name) for number, path in paths.items() if path.is_file()}
    if not stored:
        return None
    # Metrics measured under different protocols are not comparable.
    protocol = stored[min(stored)]["protocol"]
    documents = {number: document for number, document in stored.items() if document["protocol"] == protocol}
    metrics = {
        number: {key: _metric(values) for key, values in document["metrics"].items()}
        for number, document in documents.items()
    }
    final = run.final if run.stopped_at is not None and run.final in metrics else None
    first, last = documents[min(metrics)], documents[max(metrics) if final is None else final]
    after = last.get("rows", []) if len(metrics) > 1 else []
    excluded = sorted(stored.keys() - documents.keys())
    return Evaluation(name, metrics, last["protocol"], first.get("rows", []), after, final, excluded)


def _metric(values: Mapping[str, Any]) -> Metric:
    return Metric(values.get("value"), values.get("low"), values.get("high"), values.get("n") or 0)


def paired_rows(evaluation: Evaluation) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """List (row of the first policy, row of the last policy) for the prompts that both answered."""
    after = {row["id"]: row for row in evaluation.after}
    return [(row, after[row["id"]]) for row in evaluation.before if row["id"] in after]


def headline_difference(evaluation: Evaluation) -> Metric | None:
    """Compute the change of the first headline metric on the prompts that both policies answered.

    The interval of a paired difference is narrower than a comparison of two separate intervals.

    Returns:
        The mean change of CHAIR_S or, if the objects in the images are not known, of the share of doubted claims or
        of R_I; None without rows.
    """
    rows = paired_rows(evaluation)
    if not rows:
        return None
    if evaluation.truth_known:
        before, after = ([(int(bool(pair[side]["hallucinated"])), 1) for pair in rows] for side in (0, 1))
    else:
        key = evaluation.headline[0].key
        before, after = ([pair[side]["tallies"][key] for pair in rows] for side in (0, 1))
    difference = paired_difference(before, after)
    return Metric(difference.value, difference.low, difference.high, difference.n)


def intervals_overlap(left: Metric, right: Metric) -> bool:
    """Check whether two 95 % intervals overlap; true if either is missing."""
    if left.low is None or left.high is None or right.low is None or right.high is None:
        return True
    return left.low <= right.high and right.low <= left.high
