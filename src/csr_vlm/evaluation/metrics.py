"""Define every evaluation metric once: label, meaning, direction, number format, bounds.

The console, ``csr watch``, the report, the model card and the benchmarks read labels, formats
and the display order from here. Keys are those of the stored evaluations; values are at least 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from csr_vlm.core.formatting import compact, fixed

Direction = Literal["lower", "higher", "none"]
"""The direction of improvement; none for descriptive metrics such as length."""


@dataclass(frozen=True)
class MetricSpec:
    """Describe one metric."""

    key: str
    label: str
    meaning: str
    better: Direction = "higher"
    digits: int | None = 3
    """Decimals; None chooses them by magnitude."""
    upper_bound: float | None = 1.0
    """Largest possible value; None if the metric is unbounded."""
    axis_from_zero: bool = False
    """Whether a chart's vertical axis starts at 0."""

    @property
    def hint(self) -> str:
        """Return the direction of improvement in words; empty if there is none."""
        return "" if self.better == "none" else f"{self.better} is better"

    def decline(self, before: float, after: float) -> float:
        """Return by how much the metric got worse; negative if it improved, 0 without a direction."""
        return {"lower": after - before, "higher": before - after, "none": 0.0}[self.better]

    def format(self, value: float | None) -> str:
        """Format a value with the metric's decimals."""
        return compact(value) if self.digits is None else fixed(value, self.digits)


def _by_key(*specs: MetricSpec) -> dict[str, MetricSpec]:
    return {spec.key: spec for spec in specs}


METRICS: Mapping[str, MetricSpec] = _by_key(
    MetricSpec("chair_s", "CHAIR_S", "responses that mention an absent object", "lower", axis_from_zero=True),
    MetricSpec("chair_i", "CHAIR_I", "object mentions that are hallucinated", "lower", axis_from_zero=True),
    MetricSpec("recall", "Recall", "objects in the image that the response mentions"),
    MetricSpec("companion_recall", "Companion recall", "recall of objects that usually appear with another one"),
    MetricSpec("attributes_right", "Colors right", "mentions of present objects with the correct color"),
    MetricSpec("f1", "F1", "harmonic mean of 1 − CHAIR_I and recall"),
    MetricSpec("repeats", "Repeats", "repeated sentences per response", "lower", upper_bound=None, axis_from_zero=True),
    MetricSpec("sentences", "Sentences", "sentences per response", "none", 2, None, axis_from_zero=True),
    MetricSpec("words", "Words", "words per response", "none", 1, None, axis_from_zero=True),
    MetricSpec("tokens", "Tokens", "CHAIR’s word tokens per response", "none", 1, None, axis_from_zero=True),
    MetricSpec("complete", "Complete", "responses that end with the end-of-sequence token"),
    MetricSpec("relevance", "R_I", "mean image-text relevance of the sentences, 0 to 100", "higher", 1, 100.0),
    MetricSpec(
        "doubted", "Doubted claims", "claims with evidence against them by the scorer", "lower", axis_from_zero=True
    ),
    MetricSpec("yes_no_present", "Yes/no, present", "correct answers about present objects"),
    MetricSpec("yes_no_absent", "Yes/no, absent", "correct answers about randomly chosen absent objects"),
    MetricSpec("yes_no_companion", "Yes/no, companion", "correct answers about absent companions of present objects"),
)
"""The metrics of the evaluations on scenes, COCO captions (CHAIR) and held-out prompts, in display order."""
POPE_METRICS: Mapping[str, MetricSpec] = _by_key(
    MetricSpec("accuracy", "Accuracy", "correct answers"),
    MetricSpec("precision", "Precision", "questions answered yes whose label is yes"),
    MetricSpec("recall", "Recall", "questions labeled yes that are answered yes"),
    MetricSpec("f1", "F1", "harmonic mean of precision and recall"),
    MetricSpec("yes_ratio", "Yes ratio", "questions answered yes", "none"),
)
"""The metrics of POPE, in display order; files of several settings add ``mean_KEY`` and ``KEY_SETTING``."""
_AMBER_KINDS = ("existence", "attribute", "state", "number", "action", "relation")
SUITE_METRICS: Mapping[str, MetricSpec] = _by_key(
    MetricSpec("amber_chair", "AMBER CHAIR", "object mentions that are hallucinated", "lower"),
    MetricSpec("amber_cover", "AMBER Cover", "annotated objects that are mentioned"),
    MetricSpec("amber_hal", "AMBER Hal", "responses with a hallucination", "lower"),
    MetricSpec("amber_cog", "AMBER Cog", "likely hallucinations that are mentioned", "lower"),
    MetricSpec("amber_accuracy", "AMBER accuracy", "correct answers"),
    MetricSpec("amber_precision", "AMBER precision", "answers no whose label is no"),
    MetricSpec("amber_recall", "AMBER recall", "questions labeled no that are answered no"),
    MetricSpec("amber_f1", "AMBER F1", "harmonic mean of precision and recall of no"),
    *(
        MetricSpec(f"amber_{rate.lower()}_{kind}", f"AMBER {rate}, {kind}", f"{rate} on questions of the kind {kind}")
        for kind in _AMBER_KINDS
        for rate in ("accuracy", "precision", "recall", "F1")
    ),
    MetricSpec("amber_unread", "AMBER unread", "answers that begin with neither yes nor no", "lower"),
    MetricSpec("hallusion_a_acc", "HallusionBench aAcc", "correct answers"),
    MetricSpec("hallusion_f_acc", "HallusionBench fAcc", "figures with only correct answers"),
    MetricSpec("hallusion_q_acc", "HallusionBench qAcc", "questions answered correctly on all their figures"),
    MetricSpec("hallusion_unread", "HallusionBench unread", "answers that are neither yes nor no", "lower"),
    MetricSpec("mmhal_score", "MMHal score", "mean rating by the judge, 0 to 6", "higher", 2, 6.0),
    MetricSpec("mmhal_rate", "MMHal rate", "answers that the judge rates as hallucinated", "lower"),
    MetricSpec("mmhal_unread", "MMHal unread", "replies of the judge without one rating", "lower"),
    MetricSpec("objecthal_response", "Object HalBench response", "descriptions that name an absent object", "lower"),
    MetricSpec("objecthal_mention", "Object HalBench mention", "objects named that are absent", "lower"),
    MetricSpec("objecthal_recall", "Object HalBench recall", "objects in the image that are named"),
    MetricSpec("objecthal_unread", "Object HalBench unread", "replies of the judge that are no list", "lower"),
)
"""The metrics of ``csr eval hallucination`` besides CHAIR and POPE, in display order."""


def headline_metrics(truth_known: bool, by_claim: bool = False) -> tuple[str, ...]:
    """Return the keys shown first: hallucination if the objects in the images are known, else evidence or relevance."""
    if truth_known:
        return ("chair_s", "chair_i", "recall")
    return ("doubted", "sentences", "repeats") if by_claim else ("relevance", "sentences", "repeats")


def metric_spec(key: str, evaluation: str = "") -> MetricSpec:
    """Return the description of a stored metric.

    Args:
        key: Key in an evaluation's ``metrics``. An unknown key becomes its own label.
        evaluation: Name of the evaluation; ``pope`` defines ``recall`` and ``f1`` differently from CHAIR.

    Example:
        >>> metric_spec("chair_s").label, metric_spec("f1_adversarial").label, metric_spec("gqa").label
        ('CHAIR_S', 'F1, adversarial', 'gqa')
    """
    specs = POPE_METRICS if evaluation == "pope" else METRICS
    if (spec := specs.get(key) or POPE_METRICS.get(key) or SUITE_METRICS.get(key)) is not None:
        return spec
    if key.startswith("mmhal_score_"):
        kind = key.removeprefix("mmhal_score_")
        return replace(SUITE_METRICS["mmhal_score"], key=key, label=f"MMHal score, {kind}")
    for rate, spec in POPE_METRICS.items():
        if key == f"mean_{rate}":
            return replace(spec, key=key, label=f"{spec.label}, mean")
        if key.startswith(f"{rate}_"):
            return replace(spec, key=key, label=f"{spec.label}, {key.removeprefix(rate)[1:]}")
    return MetricSpec(key, key, "", "none", None, None)


def sort_metrics(keys: Iterable[str]) -> list[str]:
    """Sort metric keys in display order; keys without a position follow in alphabetical order.

    Example:
        >>> sort_metrics(["words", "zeta", "recall", "accuracy"])
        ['recall', 'words', 'accuracy', 'zeta']
    """
    positions = {key: index for index, key in enumerate(dict.fromkeys([*METRICS, *POPE_METRICS, *SUITE_METRICS]))}
    return sorted(keys, key=lambda key: (positions.get(key, len(positions)), key))
