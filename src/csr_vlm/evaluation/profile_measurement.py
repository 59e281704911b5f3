"""Turn the contrasts that were measured on labeled captions into a profile file."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from csr_vlm.core.records import negatives_column
from csr_vlm.evaluation.labeled_captions import LabeledCaptions, LabeledText
from csr_vlm.evaluation.scorer_profile import (
    ByTruth,
    JudgeProfile,
    Normal,
    PictureProfile,
    PolicyProfile,
    Profile,
    SentenceContrasts,
    Truth,
)
from csr_vlm.evaluation.scorer_validation import SIZES, ScoredCaptions, correlation, residuals
from csr_vlm.evaluation.sentence_kinds import DETAILS

MIN_TEXTS = 5
"""Fewest texts from which a distribution is measured."""
_TRUTHS: tuple[Truth, ...] = ("grounded", "habit", "random")


def measured_profile(
    scored: ScoredCaptions, name: str, description: str, scorers: Sequence[str], shared_error: float | None
) -> Profile | None:
    """Return the profile of one scorer, or of two, and of the captions' policy.

    Distributions of fewer than ``MIN_TEXTS`` texts take the place of the nearest one that has more:
    false texts by habit and at random that of all false texts, leads and moods that of true details.

    Args:
        scored: Scored captions.
        name: Name of the profile.
        description: One line that says what was measured.
        scorers: One or two scorers.
        shared_error: Correlation of the errors of two scorers, for ``shared_error``.

    Returns:
        The profile; None if fewer than ``MIN_TEXTS`` true or false sentences, or claims, were measured.
    """
    judges = [_judge(scored, scorer) for scorer in scorers[:2]]
    if any(judge is None for judge in judges):
        return None
    content: dict[str, Any] = {
        "name": name,
        "description": description,
        "source": f"measured by csr validate-scorer on {len(scored.captions.pictures)} labeled pictures",
        "pictures": _pictures(scored.captions),
        "policy": _policy(scored.captions),
        "judge": judges[0],
    }
    if len(judges) > 1:
        content["second"] = judges[1]
        content["shared_error"] = min(max(shared_error or 0.0, 0.0), 1.0)
    return Profile.model_validate(content)


def profile_text(profile: Profile) -> str:
    """Return a profile as YAML that ``read_profile`` reads; values are rounded to four decimals."""
    content = _rounded(profile.model_dump(mode="json", exclude_none=True, exclude_unset=True))
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)
    return text


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def _judge(scored: ScoredCaptions, scorer: str) -> JudgeProfile | None:
    sentences, claims = scored.texts("sentences"), scored.texts("claims")
    values, claim_values = scored.contrasts(scorer, "sentences"), scored.contrasts(scorer, "claims")
    details = [(text, value) for text, value in zip(sentences, values, strict=True) if text.kind in DETAILS]
    by_sentence = _by_truth(details)
    by_claim = _by_truth(list(zip(claims, claim_values, strict=True)))
    if by_sentence is None or by_claim is None:
        return None

    def of_kind(kind: str, select: Callable[[LabeledText], bool]) -> Normal | None:
        return _normal([v for t, v in zip(sentences, values, strict=True) if t.kind == kind and select(t)])

    def is_true(text: LabeledText) -> bool:
        return text.truth == "grounded"

    cosines = [row[negatives_column(scorer)] for row in scored.claims]
    spreads = [float(np.std(group, ddof=1)) for group in scored.unrelated[scorer]]
    return JudgeProfile(
        sentence=SentenceContrasts(
            **by_sentence,
            lead=of_kind("lead", is_true) or by_sentence["grounded"],
            mood=of_kind("mood", lambda _: True) or by_sentence["grounded"],
            relation=of_kind("relation", is_true),
            background=of_kind("background", is_true),
        ),
        claim=ByTruth(**by_claim),
        size=_size_factors(claims, claim_values),
        baseline=float(np.mean(cosines)),
        spread=float(np.mean(spreads)) if spreads else 0.015,
        correlation=min(max(_error_correlation(scored, values, claim_values) or 0.0, 0.0), 1.0),
    )


def _normal(values: Sequence[float]) -> Normal | None:
    if len(values) < MIN_TEXTS:
        return None
    return Normal(mean=float(np.mean(values)), sd=float(np.std(values, ddof=1)))


def _by_truth(chosen: Sequence[tuple[LabeledText, float]]) -> dict[str, Normal] | None:
    """Return a distribution per truth; None if there are too few true or false texts."""
    grounded = _normal([value for text, value in chosen if text.truth == "grounded"])
    false = _normal([value for text, value in chosen if text.truth in ("habit", "random")])
    if grounded is None or false is None:
        return None
    parts = {truth: _normal([value for text, value in chosen if text.truth == truth]) for truth in _TRUTHS}
    return {"grounded": grounded, "habit": parts["habit"] or false, "random": parts["random"] or false}


def _size_factors(claims: Sequence[LabeledText], values: Sequence[float]) -> dict[Any, float]:
    """Return the mean contrast of true claims about objects of each size, over that of all sizes."""
    sized = [(text.size, value) for text, value in zip(claims, values, strict=True) if text.size is not None]
    whole = float(np.mean([value for _, value in sized])) if sized else 0.0
    factors: dict[Any, float] = {}
    for size in SIZES:
        own = [value for its_size, value in sized if its_size == size]
        factors[size] = float(np.mean(own)) / whole if len(own) >= MIN_TEXTS and whole > 0 else 1.0
    return factors


def _error_correlation(scored: ScoredCaptions, values: Sequence[float], claim_values: Sequence[float]) -> float | None:
    """Correlate the error of each detail with the mean error of its claims."""
    claims = scored.texts("claims")
    error = {
        (claim.picture, claim.claims[0]): value
        for claim, value in zip(claims, residuals(claims, claim_values), strict=True)
    }
    chosen = [(t, v) for t, v in zip(scored.texts("sentences"), values, strict=True) if t.kind in DETAILS and t.claims]
    if not chosen:
        return None
    own = residuals([text for text, _ in chosen], [value for _, value in chosen])
    means = [float(np.mean([error[text.picture, claim] for claim in text.claims])) for text, _ in chosen]
    return correlation(own, means)


def _pictures(captions: LabeledCaptions) -> PictureProfile:
    numbers = [len(picture.objects) for picture in captions.pictures if picture.objects]
    shown = Counter(kind for picture in captions.pictures for kind in picture.objects)
    others = len(captions.pictures) - 1
    elsewhere = [(shown[kind] - 1) / others for picture in captions.pictures for kind in picture.objects]
    low, high = np.percentile(numbers or [1], [10, 90])
    return PictureProfile(
        num_objects=(max(int(low), 1), max(int(high), 1)),
        true_elsewhere=float(np.mean(elsewhere)) if elsewhere else 0.0,
    )


def _policy(captions: LabeledCaptions) -> PolicyProfile:
    """Describe how the captions are written; what they do not show keeps its default."""
    by_caption: dict[tuple[int, int], list[LabeledText]] = defaultdict(list)
    for text in captions.sentences:
        by_caption[text.picture, text.caption].append(text)
    low, high = np.percentile([len(own) for own in by_caption.values()] or [1], [10, 90])
    num_sentences = (max(int(low), 1), max(int(high), 1))
    later = [text for text in captions.sentences if text.position > 0]
    details = [text for text in later if text.kind != "mood"]
    content: dict[str, Any] = {"num_sentences": num_sentences, "style": "caption"}
    if num_sentences[1] == 1:
        content["style"] = "short_answer"
    elif details and sum(text.kind == "item" for text in details) > len(details) / 2:
        content["style"] = "list"
    if later:
        frequency = Counter("detail" if text.kind == "item" else text.kind for text in later)
        content["kinds"] = {kind: number / len(later) for kind, number in sorted(frequency.items())}
    if details:
        numbers = Counter(min(len(text.claims), 3) for text in details)
        content["num_claims"] = tuple(numbers[number] / len(details) for number in range(1, max(numbers) + 1))
        content["repeats"] = _share_of_repeats(by_caption)
    return PolicyProfile.model_validate(content | _false_claims(captions, num_sentences[1]))


def _share_of_repeats(by_caption: Mapping[tuple[int, int], Sequence[LabeledText]]) -> float:
    """Return the share of the later sentences that name only what their response has named."""
    repeats = total = 0
    for sentences in by_caption.values():
        named: set[str] = set()
        for sentence in sentences:
            if sentence.position > 0 and sentence.claims:
                repeats += set(sentence.claims) <= named
                total += 1
            named |= set(sentence.claims)
    return repeats / total if total else 0.0


def _false_claims(captions: LabeledCaptions, most: int) -> dict[str, float]:
    """Return the shares of false claims at the second and at the last sentence, by a line through all, and of habit."""
    points = [
        (min(text.position, most - 1), (name not in captions.pictures[text.picture].objects))
        for text in captions.sentences
        if text.position > 0
        for name in text.claims
    ]
    content: dict[str, float] = {}
    positions = {position for position, _ in points}
    if points:
        rate = float(np.mean([is_false for _, is_false in points]))
        first = last = rate
        if len(positions) > 1:
            slope, start = np.polyfit([p for p, _ in points], [float(f) for _, f in points], 1)
            first, last = start + slope, start + slope * (most - 1)
        content |= {"false_first": min(max(first, 0.0), 1.0), "false_last": min(max(last, 0.0), 1.0)}
    false = [claim.truth for claim in captions.claims if claim.truth in ("habit", "random")]
    if false and captions.habits_known:
        content["habit"] = false.count("habit") / len(false)
    return content
