"""What is measured, what it is called, which way is better, and the verdict it adds up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from csr_vlm.evaluation.statistics import Metric, ratio
from csr_vlm.report.formats import fixed, plural, relative_change, signed
from csr_vlm.store import files
from csr_vlm.store.run import Run

NOTICEABLE = 0.01
"""A rate that moves the wrong way by more than this is named in the verdict."""


@dataclass(frozen=True)
class Measure:
    """One metric of an evaluation, as the report shows it."""

    key: str
    label: str
    meaning: str
    better: Literal["lower", "higher", "neither"] = "higher"
    digits: int = 3
    from_zero: bool = False
    at_most: float | None = 1.0
    """Largest value it can have; None where it has no bound."""

    @property
    def hint(self) -> str:
        return "" if self.better == "neither" else f"{self.better} is better"

    def worse_by(self, before: float, after: float) -> float:
        """How far it moved the wrong way; negative where it improved, 0 where neither way is wrong."""
        return {"lower": after - before, "higher": before - after, "neither": 0.0}[self.better]


MEASURES = (
    Measure("chair_s", "CHAIR_S", "responses that name something absent", "lower", from_zero=True),
    Measure("chair_i", "CHAIR_I", "mentions that name something absent", "lower", from_zero=True),
    Measure("recall", "Recall", "objects in the picture that are named"),
    Measure("repeats", "Repeats per response", "sentences said again", "lower", 2, from_zero=True, at_most=None),
    Measure("words", "Words per response", "length", "neither", 1, from_zero=True, at_most=None),
    Measure("relevance", "R_I", "mean image relevance of a sentence, 0 to 100", "higher", 1, at_most=100.0),
    Measure("companion_recall", "Companion recall", "recall of objects that the language prior expects anyway"),
    Measure("attributes_right", "Colours right", "mentions of present objects with their true colour"),
    Measure("complete", "Complete", "responses that ended by themselves"),
    Measure("yes_no_present", "Yes/no, present", "right answers about objects that are there"),
    Measure("yes_no_absent", "Yes/no, absent", "right answers about objects that are not there"),
    Measure("yes_no_companion", "Yes/no, companion", "right answers about absent objects that the prior expects"),
)
PLOTTED = MEASURES[:6]
HEADLINE = MEASURES[:3]

Measured = Mapping[int, Mapping[str, Metric]]
"""Iteration (0: the base model) to metric name to value and interval."""


@dataclass(frozen=True)
class Verdict:
    """What the numbers add up to."""

    sentence: str
    tone: Literal["better", "worse", "mixed", "none"]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Evaluation:
    """The evaluations a run has, and their rows for the first and the last policy."""

    measured: Measured
    protocol: Mapping[str, Any]
    before: Sequence[Mapping[str, Any]]
    after: Sequence[Mapping[str, Any]]
    """Empty where only one policy is evaluated."""
    final: int | None = None
    """The iteration that is the run's result, where the run was stopped."""

    @property
    def first(self) -> int:
        return min(self.measured)

    @property
    def last(self) -> int:
        return max(self.measured) if self.final is None else self.final

    def metric(self, iteration: int, key: str) -> Metric:
        return self.measured[iteration].get(key, Metric(None, None, None, 0))


def read_evaluation(run: Run) -> Evaluation | None:
    """Read what finished evaluations found; None where there are none."""
    measured: dict[int, dict[str, Metric]] = {}
    for number in range(run.config.iterations + 1):
        found = run.result(number, "evaluate").get("world") if run.is_done(number, "evaluate") else None
        if found:
            measured[number] = {name: _metric(values) for name, values in found.items()}
    if not measured:
        return None
    final = None if run.stopped_at is None else run.final
    first, last = _document(run, min(measured)), _document(run, max(measured) if final is None else final)
    after = last.get("rows", []) if len(measured) > 1 else []
    return Evaluation(measured, last.get("protocol", {}), first.get("rows", []), after, final)


def _metric(values: Mapping[str, Any]) -> Metric:
    return Metric(values.get("value"), values.get("low"), values.get("high"), values.get("n") or 0)


def _document(run: Run, number: int) -> dict[str, Any]:
    path = run.evaluation_path(number, "world")
    document: dict[str, Any] = files.read_json(path) if path.is_file() else {}
    return document


def shared_rows(evaluation: Evaluation) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """List (base row, final row) of the scenes that both policies described."""
    final = {row["id"]: row for row in evaluation.after}
    return [(row, final[row["id"]]) for row in evaluation.before if row["id"] in final]


def paired_difference(evaluation: Evaluation) -> Metric | None:
    """Compute how CHAIR_S changed on the scenes that both policies described.

    Both describe the same scenes, so the interval of the difference is narrower and says
    more than two intervals side by side.
    """
    rows = shared_rows(evaluation)
    if not rows:
        return None
    return ratio([bool(b["hallucinated"]) - bool(a["hallucinated"]) for a, b in rows], [1.0] * len(rows))


def verdict(run: Run, evaluation: Evaluation | None) -> Verdict:
    """Say in one sentence, good or bad, what the run did."""
    if evaluation is None:
        trained = run.last_trained
        done = f"{trained} of {plural(run.config.iterations, 'iteration')} {'is' if trained == 1 else 'are'} trained"
        reason = "no evaluation has finished" if run.config.evaluation.world else "this run evaluates nothing"
        return Verdict(
            f"{done}; {reason}, so whether the model hallucinates less is not known.", "none", _stop_notes(run)
        )
    base, last = evaluation.first, evaluation.last
    if run.stopped_at is not None and run.final == 0:
        return Verdict("Iteration 1 did not pass, so the base model stays as it is.", "none", _stop_notes(run))
    if base == last:
        before = fixed(evaluation.metric(base, "chair_s").value)
        name = "the base model" if base == 0 else f"iteration {base}"
        return Verdict(f"Only {name} is evaluated so far: its CHAIR_S is {before}.", "none", _stop_notes(run))
    return _comparison(run, evaluation)


def _comparison(run: Run, evaluation: Evaluation) -> Verdict:
    base, last = evaluation.first, evaluation.last
    before, after = (evaluation.metric(n, "chair_s").value for n in (base, last))
    if before is None or after is None:
        return Verdict("CHAIR_S has no value, so whether the model hallucinates less is not known.", "none")
    planned = run.config.iterations
    when = f"After {plural(last, 'iteration')}" if last == planned else f"After {last} of {planned} iterations"
    difference = paired_difference(evaluation)
    certain = _certain(evaluation, difference)
    sentence, tone = _hallucination_clause(before, after, certain)
    recall, lost = _recall_clause(evaluation)
    if lost:
        tone = "mixed" if tone == "better" else "worse"
    return Verdict(f"{when} {sentence}{recall}.", tone, _stop_notes(run) + _notes(evaluation, difference))


def _stop_notes(run: Run) -> list[str]:
    """Say why a run stopped and what it kept, where it did."""
    if run.stopped_at is None:
        return []
    kept = f"iteration {run.final}" if run.final else "the base model"
    by_pairs = run.is_done(run.stopped_at, "audit") and run.result(run.stopped_at, "audit")["stopped"]
    stage, when = ("audit", "before training") if by_pairs else ("gate", "after")
    reasons = "; ".join(run.result(run.stopped_at, stage)["reasons"])
    return [f"The run stopped {when} iteration {run.stopped_at} and kept {kept}: {reasons}."]


def _certain(evaluation: Evaluation, difference: Metric | None) -> bool:
    """Whether the change of CHAIR_S is more than the draw of the scenes can explain."""
    if difference is not None and difference.low is not None and difference.high is not None:
        return difference.low > 0 or difference.high < 0
    return not _overlap(*(evaluation.metric(n, "chair_s") for n in (evaluation.first, evaluation.last)))


def _hallucination_clause(
    before: float, after: float, certain: bool
) -> tuple[str, Literal["better", "worse", "mixed", "none"]]:
    if before == after:
        return f"CHAIR_S stayed at {fixed(after)}", "none"
    change = relative_change(before, after)
    extent = f"from {fixed(before)} to {fixed(after)}" + (f" ({change})" if change else "")
    if not certain:
        word = "fell" if after < before else "rose"
        return f"CHAIR_S {word} {extent}, which may be chance", "none" if after < before else "mixed"
    if after < before:
        return f"CHAIR_S fell {extent}", "better"
    return f"CHAIR_S rose {extent}: the model hallucinates more than before", "worse"


def _recall_clause(evaluation: Evaluation) -> tuple[str, bool]:
    """Say how recall went, and whether it fell noticeably."""
    before, after = (evaluation.metric(n, "recall").value for n in (evaluation.first, evaluation.last))
    if before is None or after is None:
        return "", False
    if before - after > NOTICEABLE:
        extent = f"from {fixed(before)} to {fixed(after)} ({signed(after - before)})"
        return f", but recall fell {extent}: it leaves out more of what is there", True
    return f", while recall went from {fixed(before)} to {fixed(after)}", False


def _notes(evaluation: Evaluation, difference: Metric | None) -> list[str]:
    notes = []
    if difference is not None:
        notes.append(
            f"On the same {plural(difference.n, 'scene')} CHAIR_S changed by {signed(difference.value)} "
            f"(95 % interval {signed(difference.low)} to {signed(difference.high)})."
        )
    lowest = {n: m.value for n in evaluation.measured if (m := evaluation.metric(n, "chair_s")).value is not None}
    best = min(lowest, key=lambda n: (lowest[n], -n))
    if best != evaluation.last:
        name = "with the base model" if best == 0 else f"after iteration {best}"
        notes.append(f"CHAIR_S was lowest {name}, at {fixed(lowest[best])}, not at the end.")
    worse = _worse(evaluation)
    if worse:
        notes.append(f"Worse than the base model: {', '.join(worse)}.")
    return notes


def _worse(evaluation: Evaluation) -> list[str]:
    """Name what moved the wrong way, CHAIR_S aside: the sentence has it."""
    found = []
    for measure in MEASURES[1:]:
        before, after = (evaluation.metric(n, measure.key) for n in (evaluation.first, evaluation.last))
        if before.value is None or after.value is None:
            continue
        if measure.worse_by(before.value, after.value) > NOTICEABLE * (measure.at_most or 1.0):
            doubt = " (intervals overlap)" if _overlap(before, after) else ""
            found.append(f"{measure.label} {signed(after.value - before.value, measure.digits)}{doubt}")
    return found


def _overlap(left: Metric, right: Metric) -> bool:
    if left.low is None or left.high is None or right.low is None or right.high is None:
        return True
    return left.low <= right.high and right.low <= left.high
