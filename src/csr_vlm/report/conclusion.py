"""State in one sentence what a run achieved, good or bad, with the caveats that belong to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from csr_vlm.core.formatting import fixed, plural, relative_change, signed
from csr_vlm.evaluation.compare import policy_name
from csr_vlm.evaluation.metrics import METRICS, metric_spec
from csr_vlm.evaluation.statistics import Metric
from csr_vlm.report.evaluations import Evaluation, headline_difference, intervals_overlap
from csr_vlm.store.run import Run

_RELEVANCE_CAVEAT = (
    "Hallucination was not measured. R_I is part of the training reward, so an increase does not show that the "
    "model hallucinates less; csr eval chair and csr eval pope measure that on images with known objects."
)
_EVIDENCE_CAVEAT = (
    "Hallucination was not measured. The scorer that doubts these claims also chose the pairs, so a decrease does not "
    "show that the model hallucinates less; csr eval chair and csr eval pope measure that on images with known objects."
)
NOTICEABLE = 0.01
"""A decline larger than this share of a metric's range is named in the conclusion."""

Tone = Literal["better", "worse", "mixed", "none"]


@dataclass(frozen=True)
class Conclusion:
    """Hold the conclusion of a run."""

    sentence: str
    tone: Tone
    notes: Sequence[str] = ()


def conclude(run: Run, evaluation: Evaluation | None) -> Conclusion:
    """Draw the conclusion from the run's evaluation and its quality gates."""
    conclusion = _conclude(run, evaluation)
    if evaluation is None or not evaluation.excluded:
        return conclusion
    names = ", ".join(f"iteration {number}" for number in evaluation.excluded)
    return replace(conclusion, notes=[*conclusion.notes, f"Excluded because of a different protocol: {names}."])


def _conclude(run: Run, evaluation: Evaluation | None) -> Conclusion:
    notes = _stop_notes(run)
    if evaluation is None:
        progress = f"{run.last_trained} of {plural(run.config.iterations, 'iteration')} trained"
        planned = run.config.evaluation.world or run.config.evaluation.heldout
        reason = "no evaluation has finished yet" if planned else "this run has no evaluation"
        return Conclusion(f"{progress}. The effect on hallucination is unknown: {reason}.", "none", notes)
    if run.stopped_at is not None and run.final == 0:
        return Conclusion("Iteration 1 did not pass its checks. The result is the base model.", "none", notes)
    if evaluation.first == evaluation.last:
        spec = evaluation.headline[0]
        value = spec.format(evaluation.metric(evaluation.first, spec.key).value)
        name = "the base model" if evaluation.first == 0 else policy_name(evaluation.first)
        return Conclusion(f"Only {name} has been evaluated so far: {spec.label} is {value}.", "none", notes)
    return _conclude_hallucination(run, evaluation) if evaluation.truth_known else _conclude_unlabeled(run, evaluation)


def subject(run: Run, evaluation: Evaluation | None) -> str:
    """Say in one sentence what was trained on, and on what and by what it was measured."""
    sources = " and ".join(map(_short, run.config.data.sources[:2]))
    trained = f"Trained on preference pairs of the model's own responses about the pictures of {sources}"
    if run.config.data.pairs is not None:
        trained = f"Trained on the preference pairs of {_short(run.config.data.pairs)}"
    if evaluation is None:
        return f"{trained}; not measured."
    protocol, n = evaluation.protocol, evaluation.metric(evaluation.last, evaluation.headline[0].key).n
    if evaluation.name == "world":
        what = f"{n:,} {protocol.get('split', 'test')} scenes of the toy world {protocol.get('world', '')}".rstrip()
        return f"{trained}; measured on {what}, whose drawn pictures are known completely. This is a demonstration."
    if evaluation.truth_known:
        return f"{trained}; measured by CHAIR on captions of {plural(n, 'image')} with annotated objects."
    return f"{trained}; measured by the scorer on {plural(n, 'held-out prompt')}, without knowing what the images show."


def _short(source: str) -> str:
    """Return the last two parts of a path."""
    return "/".join(part for part in Path(source).parts[-2:] if part != "/")


def _elapsed(run: Run, last: int) -> str:
    planned = run.config.iterations
    return f"After {plural(last, 'iteration')}" if last == planned else f"After {last} of {planned} iterations"


def _conclude_hallucination(run: Run, evaluation: Evaluation) -> Conclusion:
    before, after = (metric.value for metric in evaluation.endpoints("chair_s"))
    if before is None or after is None:
        sentence = "The effect on hallucination is unknown: CHAIR_S has no value."
        return Conclusion(sentence, "none", _stop_notes(run))
    difference = headline_difference(evaluation)
    clause, tone = _chair_clause(before, after, _is_significant(evaluation, difference, "chair_s"))
    recall, recall_fell = _recall_clause(evaluation)
    if recall_fell:
        tone = "mixed" if tone == "better" else "worse"
    notes = _stop_notes(run) + _hallucination_notes(evaluation, difference)
    return Conclusion(f"{_elapsed(run, evaluation.last)}, {clause}{recall}.", tone, notes)


def _conclude_unlabeled(run: Run, evaluation: Evaluation) -> Conclusion:
    """Compare responses to held-out prompts by the scorer's evidence, where hallucination cannot be measured."""
    spec = evaluation.headline[0]
    before, after = (metric.value for metric in evaluation.endpoints(spec.key))
    if before is None or after is None:
        sentence = "The responses to held-out prompts contain no sentence that can be scored."
        return Conclusion(sentence, "worse", _stop_notes(run))
    difference = headline_difference(evaluation)
    significant = _is_significant(evaluation, difference, spec.key)
    tone: Tone = "none" if not significant else "worse" if spec.decline(before, after) > 0 else "better"
    num_prompts = plural(evaluation.metric(evaluation.last, spec.key).n, "held-out prompt")
    what = (
        "the share of claims with evidence against them in" if evaluation.by_claim else "image-text relevance (R_I) of"
    )
    if before == after:
        extent = f"stayed at {spec.format(after)}"
    else:
        extent = f"{'rose' if after > before else 'fell'} from {spec.format(before)} to {spec.format(after)}"
        extent += "" if significant else ", which is not statistically significant"
    sentence = f"{_elapsed(run, evaluation.last)}, {what} the responses to {num_prompts} {extent}."
    notes = [*_stop_notes(run), _EVIDENCE_CAVEAT if evaluation.by_claim else _RELEVANCE_CAVEAT]
    if difference is not None and difference.value is not None:
        interval = _interval(difference, spec.digits or 0)
        notes.append(
            f"Paired difference of {spec.label.replace('Doubted', 'doubted')} on the same prompts: {interval}."
        )
    return Conclusion(sentence, tone, notes + _decline_notes(evaluation))


def _stop_notes(run: Run) -> list[str]:
    """Explain why a run was stopped and which policy it returns; empty if it was not."""
    if run.stopped_at is None:
        return []
    result = f"iteration {run.final}" if run.final else "the base model"
    by_pairs = run.is_done(run.stopped_at, "audit") and run.result(run.stopped_at, "audit")["stopped"]
    stage, when = ("audit", "before training") if by_pairs else ("gate", "after")
    reasons = "; ".join(run.result(run.stopped_at, stage)["reasons"])
    return [f"The run stopped {when} iteration {run.stopped_at} and returned {result}: {reasons}."]


def _is_significant(evaluation: Evaluation, difference: Metric | None, key: str) -> bool:
    """Check whether the interval of the paired difference excludes 0; without one, whether the intervals are apart."""
    if difference is not None and difference.low is not None and difference.high is not None:
        return difference.low > 0 or difference.high < 0
    return not intervals_overlap(*evaluation.endpoints(key))


def _chair_clause(before: float, after: float, significant: bool) -> tuple[str, Tone]:
    """Describe the change of CHAIR_S."""
    if before == after:
        return f"CHAIR_S is unchanged at {fixed(after)}", "none"
    change = relative_change(before, after)
    extent = f"from {fixed(before)} to {fixed(after)}" + (f" ({change})" if change else "")
    if not significant:
        verb = "fell" if after < before else "rose"
        tone: Tone = "none" if after < before else "mixed"
        return f"CHAIR_S {verb} {extent}, which is not statistically significant", tone
    if after < before:
        return f"CHAIR_S fell {extent}", "better"
    return f"CHAIR_S rose {extent}: the model hallucinates more", "worse"


def _recall_clause(evaluation: Evaluation) -> tuple[str, bool]:
    """Describe the change of recall, and return whether it fell noticeably."""
    before, after = (metric.value for metric in evaluation.endpoints("recall"))
    if before is None or after is None:
        return "", False
    if before - after > NOTICEABLE:
        extent = f"from {fixed(before)} to {fixed(after)} ({signed(after - before)})"
        return f", but recall fell {extent}: the responses omit more of the objects in the image", True
    verb = "stayed at" if fixed(before) == fixed(after) else f"went from {fixed(before)} to"
    return f", while recall {verb} {fixed(after)}", False


def _hallucination_notes(evaluation: Evaluation, difference: Metric | None) -> list[str]:
    notes = []
    if difference is not None:
        noun = "scene" if evaluation.name == "world" else "caption"
        num_paired = plural(difference.n, noun)
        notes.append(f"Paired difference of CHAIR_S on the same {num_paired}: {_interval(difference, 3)}.")
    values = {n: m.value for n in evaluation.metrics if (m := evaluation.metric(n, "chair_s")).value is not None}
    best = min(values, key=lambda number: (values[number], -number))
    if best != evaluation.last:
        notes.append(f"The lowest CHAIR_S, {fixed(values[best])}, is that of {_with_article(best)}, not the result.")
    return notes + _decline_notes(evaluation)


def _with_article(iteration: int) -> str:
    return policy_name(iteration) if iteration else "the base model"


def _interval(difference: Metric, digits: int) -> str:
    return (
        f"{signed(difference.value, digits)} "
        f"(95 % interval {signed(difference.low, digits)} to {signed(difference.high, digits)})"
    )


def _decline_notes(evaluation: Evaluation) -> list[str]:
    """Name the metrics that got noticeably worse, except the one in the conclusion's sentence."""
    declines = []
    for key in METRICS:
        before, after = evaluation.endpoints(key)
        if key == evaluation.headline[0].key or before.value is None or after.value is None:
            continue
        spec = metric_spec(key)
        if spec.decline(before.value, after.value) > NOTICEABLE * (spec.upper_bound or 1.0):
            doubt = " (intervals overlap)" if intervals_overlap(before, after) else ""
            declines.append(f"{spec.label} {signed(after.value - before.value, spec.digits or 0)}{doubt}")
    return [f"Worse than the base model: {', '.join(declines)}."] if declines else []
