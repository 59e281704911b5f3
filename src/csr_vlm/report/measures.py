"""What is measured, what it is called, which way is better, and the verdict it adds up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from csr_vlm.core.formatting import fixed, plural, relative_change, signed
from csr_vlm.evaluation.statistics import Metric, ratio
from csr_vlm.evaluation.statistics import paired_difference as tallied_difference
from csr_vlm.store import files
from csr_vlm.store.run import Run

_NO_TRUTH = (
    "Whether the model hallucinates less was not measured: csr eval chair and csr eval pope do, where the truth is "
    "known. R_I is what training rewards, so it rises before anything is proved."
)
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
    Measure("sentences", "Sentences per response", "length", "neither", 2, from_zero=True, at_most=None),
    Measure("words", "Words per response", "length", "neither", 1, from_zero=True, at_most=None),
    Measure("relevance", "R_I", "mean image relevance of a sentence, 0 to 100", "higher", 1, at_most=100.0),
    Measure("companion_recall", "Companion recall", "recall of objects that the language prior expects anyway"),
    Measure("attributes_right", "Colours right", "mentions of present objects with their true colour"),
    Measure("complete", "Complete", "responses that ended by themselves"),
    Measure("yes_no_present", "Yes/no, present", "right answers about objects that are there"),
    Measure("yes_no_absent", "Yes/no, absent", "right answers about objects that are not there"),
    Measure("yes_no_companion", "Yes/no, companion", "right answers about absent objects that the prior expects"),
)
_EVALUATIONS = ("world", "chair", "heldout")
"""Where the report's numbers are looked for, the first that is there: the truth before what needs none."""
_PLOTTED = ("chair_s", "chair_i", "recall", "repeats", "words", "relevance")
_HEADLINE = {True: ("chair_s", "chair_i", "recall"), False: ("relevance", "sentences", "repeats")}
"""With and without truth."""

Tone = Literal["better", "worse", "mixed", "none"]
Measured = Mapping[int, Mapping[str, Metric]]
"""Iteration (0: the base model) to metric name to value and interval."""


@dataclass(frozen=True)
class Verdict:
    """What the numbers add up to."""

    sentence: str
    tone: Tone
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of every policy that has it, and its rows for the first and the last."""

    name: str
    measured: Measured
    protocol: Mapping[str, Any]
    before: Sequence[Mapping[str, Any]]
    after: Sequence[Mapping[str, Any]]
    """Empty where only one policy is evaluated."""
    final: int | None = None
    """The iteration that is the run's result, where the run was stopped."""
    left_out: Sequence[int] = ()
    """Iterations measured under another protocol than the first."""

    @property
    def truth_known(self) -> bool:
        """Whether it knows what is in the pictures, so that hallucination is counted."""
        return self.name != "heldout"

    @property
    def headline(self) -> list[Measure]:
        by_key = {measure.key: measure for measure in MEASURES}
        return [by_key[key] for key in _HEADLINE[self.truth_known]]

    @property
    def plotted(self) -> list[Measure]:
        """The measures that get a chart: the first six that people read, of those there are."""
        present = {key for metrics in self.measured.values() for key in metrics}
        wanted = _PLOTTED if self.truth_known else (*_HEADLINE[False], "words", "complete")
        return [measure for measure in MEASURES if measure.key in wanted and measure.key in present]

    @property
    def first(self) -> int:
        return min(self.measured)

    @property
    def last(self) -> int:
        return max(self.measured) if self.final is None else self.final

    def metric(self, iteration: int, key: str) -> Metric:
        return self.measured[iteration].get(key, Metric(None, None, None, 0))


def read_evaluation(run: Run) -> Evaluation | None:
    """Read the evaluation that says most: on truth, or else of held-out prompts; None where there is none."""
    return next((found for name in _EVALUATIONS if (found := evaluation_named(run, name)) is not None), None)


def evaluation_named(run: Run, name: str) -> Evaluation | None:
    """Read what an evaluation found, policy by policy; None where it was not made."""
    numbers = [n for n in range(run.config.iterations + 1) if run.evaluation_path(n, name).is_file()]
    every = {number: files.read_json(run.evaluation_path(number, name)) for number in numbers}
    # Numbers under different protocols are not to be compared.
    documents = {n: found for n, found in every.items() if found["protocol"] == every[numbers[0]]["protocol"]}
    measured = {
        number: {key: _metric(values) for key, values in document["metrics"].items()}
        for number, document in documents.items()
    }
    if not measured:
        return None
    final = run.final if run.stopped_at is not None and run.final in measured else None
    first, last = documents[min(measured)], documents[max(measured) if final is None else final]
    after = last.get("rows", []) if len(measured) > 1 else []
    left_out = sorted(every.keys() - documents.keys())
    return Evaluation(name, measured, last["protocol"], first.get("rows", []), after, final, left_out)


def _metric(values: Mapping[str, Any]) -> Metric:
    return Metric(values.get("value"), values.get("low"), values.get("high"), values.get("n") or 0)


def shared_rows(evaluation: Evaluation) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """List (base row, final row) of the scenes that both policies described."""
    final = {row["id"]: row for row in evaluation.after}
    return [(row, final[row["id"]]) for row in evaluation.before if row["id"] in final]


def paired_difference(evaluation: Evaluation) -> Metric | None:
    """Compute how CHAIR_S, or without truth R_I, changed on the prompts that both policies answered.

    Both answer the same prompts, so the interval of the difference is narrower and says
    more than two intervals side by side.
    """
    rows = shared_rows(evaluation)
    if not rows:
        return None
    if evaluation.truth_known:
        return ratio([bool(b["hallucinated"]) - bool(a["hallucinated"]) for a, b in rows], [1.0] * len(rows))
    before, after = ([pair[side]["tallies"]["relevance"] for pair in rows] for side in (0, 1))
    found = tallied_difference(before, after)
    return Metric(found.value, found.low, found.high, found.n)


def verdict(run: Run, evaluation: Evaluation | None) -> Verdict:
    """Say in one sentence, good or bad, what the run did."""
    found = _verdict(run, evaluation)
    if evaluation is None or not evaluation.left_out:
        return found
    names = ", ".join(f"iteration {number}" for number in evaluation.left_out)
    return replace(found, notes=[*found.notes, f"Measured under another protocol, and so left out: {names}."])


def _verdict(run: Run, evaluation: Evaluation | None) -> Verdict:
    if evaluation is None:
        trained = run.last_trained
        done = f"{trained} of {plural(run.config.iterations, 'iteration')} {'is' if trained == 1 else 'are'} trained"
        planned = run.config.evaluation.world or run.config.evaluation.heldout
        reason = "no evaluation has finished" if planned else "this run evaluates nothing"
        return Verdict(
            f"{done}; {reason}, so whether the model hallucinates less is not known.", "none", _stop_notes(run)
        )
    base, last = evaluation.first, evaluation.last
    if run.stopped_at is not None and run.final == 0:
        return Verdict("Iteration 1 did not pass, so the base model stays as it is.", "none", _stop_notes(run))
    if base == last:
        key, label = ("chair_s", "CHAIR_S") if evaluation.truth_known else ("relevance", "R_I")
        before = fixed(evaluation.metric(base, key).value, 3 if evaluation.truth_known else 1)
        name = "the base model" if base == 0 else f"iteration {base}"
        return Verdict(f"Only {name} is evaluated so far: its {label} is {before}.", "none", _stop_notes(run))
    return _comparison(run, evaluation) if evaluation.truth_known else _without_truth(run, evaluation)


def _when(run: Run, last: int) -> str:
    planned = run.config.iterations
    return f"After {plural(last, 'iteration')}" if last == planned else f"After {last} of {planned} iterations"


def _comparison(run: Run, evaluation: Evaluation) -> Verdict:
    base, last = evaluation.first, evaluation.last
    before, after = (evaluation.metric(n, "chair_s").value for n in (base, last))
    if before is None or after is None:
        unknown = "CHAIR_S has no value, so whether the model hallucinates less is not known."
        return Verdict(unknown, "none", _stop_notes(run))
    difference = paired_difference(evaluation)
    certain = _certain(evaluation, difference)
    sentence, tone = _hallucination_clause(before, after, certain)
    recall, lost = _recall_clause(evaluation)
    if lost:
        tone = "mixed" if tone == "better" else "worse"
    notes = _stop_notes(run) + _notes(evaluation, difference)
    return Verdict(f"{_when(run, last)} {sentence}{recall}.", tone, notes)


def _without_truth(run: Run, evaluation: Evaluation) -> Verdict:
    """Say what held-out prompts show; hallucination itself is not measured, and R_I is what training rewards."""
    base, last = evaluation.first, evaluation.last
    before, after = (evaluation.metric(n, "relevance").value for n in (base, last))
    if before is None or after is None:
        return Verdict("The responses to held-out prompts say nothing that could be scored.", "worse", _stop_notes(run))
    difference = paired_difference(evaluation)
    certain = _certain(evaluation, difference, "relevance")
    word = "more" if after > before else "less"
    extent = f"R_I went from {fixed(before, 1)} to {fixed(after, 1)}"
    tone: Tone = "none" if not certain else "better" if after > before else "worse"
    asked = plural(evaluation.metric(last, "relevance").n, "held-out prompt")
    sentence = f"responses to {asked} are {word} relevant: {extent}{'' if certain else ', which may be chance'}"
    notes = [*_stop_notes(run), _NO_TRUTH]
    if difference is not None and difference.value is not None:
        notes.append(
            f"On the same prompts R_I changed by {signed(difference.value, 1)} "
            f"(95 % interval {signed(difference.low, 1)} to {signed(difference.high, 1)})."
        )
    worse = _worse(evaluation)
    if worse:
        notes.append(f"Worse than the base model: {', '.join(worse)}.")
    return Verdict(f"{_when(run, last)} {sentence}.", tone, notes)


def _stop_notes(run: Run) -> list[str]:
    """Say why a run stopped and what it kept, where it did."""
    if run.stopped_at is None:
        return []
    kept = f"iteration {run.final}" if run.final else "the base model"
    by_pairs = run.is_done(run.stopped_at, "audit") and run.result(run.stopped_at, "audit")["stopped"]
    stage, when = ("audit", "before training") if by_pairs else ("gate", "after")
    reasons = "; ".join(run.result(run.stopped_at, stage)["reasons"])
    return [f"The run stopped {when} iteration {run.stopped_at} and kept {kept}: {reasons}."]


def _certain(evaluation: Evaluation, difference: Metric | None, key: str = "chair_s") -> bool:
    """Whether the change is more than the draw of the prompts can explain."""
    if difference is not None and difference.low is not None and difference.high is not None:
        return difference.low > 0 or difference.high < 0
    return not overlap(*(evaluation.metric(n, key) for n in (evaluation.first, evaluation.last)))


def _hallucination_clause(before: float, after: float, certain: bool) -> tuple[str, Tone]:
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
        asked = plural(difference.n, "scene" if evaluation.name == "world" else "caption")
        notes.append(
            f"On the same {asked} CHAIR_S changed by {signed(difference.value)} "
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
    """Name what moved the wrong way, the first headline aside: the sentence has it."""
    found = []
    for measure in MEASURES:
        if measure == evaluation.headline[0]:
            continue
        before, after = (evaluation.metric(n, measure.key) for n in (evaluation.first, evaluation.last))
        if before.value is None or after.value is None:
            continue
        if measure.worse_by(before.value, after.value) > NOTICEABLE * (measure.at_most or 1.0):
            doubt = " (intervals overlap)" if overlap(before, after) else ""
            found.append(f"{measure.label} {signed(after.value - before.value, measure.digits)}{doubt}")
    return found


def overlap(left: Metric, right: Metric) -> bool:
    """Whether two 95 % intervals meet; so too where there are none."""
    if left.low is None or left.high is None or right.low is None or right.high is None:
        return True
    return left.low <= right.high and right.low <= left.high
