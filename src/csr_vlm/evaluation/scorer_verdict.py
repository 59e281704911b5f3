"""Say in words whether a scorer is good enough to train with, and what to change.

The AUC is the probability that a decision between a true and a false text is right, so a policy
that is trained on such decisions sees AUC / (1 - AUC) right ones for each wrong one:

- at ``GOOD`` = 0.75 three right ones: the wrong ones are outvoted;
- at ``WEAK`` = 0.60 one and a half: what is learned is mostly noise, and below it nothing is.

A verdict is given from ``MIN_PICTURES`` pictures and ``MIN_FALSE`` false texts on. With fewer, or
where the interval of the AUC reaches from one level into another, it says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from csr_vlm.config.schema import RunConfig
from csr_vlm.evaluation.auc_intervals import Auc
from csr_vlm.evaluation.reward_placement import MarginOutcome, Placement
from csr_vlm.evaluation.scorer_validation import ScorerPair, ScorerResult, Separation

Level = Literal["good enough", "weak", "useless", "not decided"]
GOOD, WEAK = 0.75, 0.60
MIN_PICTURES, MIN_FALSE = 50, 10
_ORDER: dict[Level, int] = {"not decided": -1, "useless": 0, "weak": 1, "good enough": 2}
_WANTED_HALF_WIDTH = 0.05
_FEW_ENDS = 0.05
"""Share of the true details to which ending may be preferred; pairs of that kind are then rare beside the others."""


@dataclass(frozen=True)
class Verdict:
    """Hold what is said about one scorer."""

    scorer: str
    by_sentence: Level
    by_claim: Level
    summary: str
    advice: tuple[str, ...]

    @property
    def level(self) -> Level:
        """Return the better of both levels, because the method can use either."""
        return max(self.by_sentence, self.by_claim, key=_ORDER.__getitem__)

    def dump(self) -> dict[str, Any]:
        return {**asdict(self), "level": self.level}


def level_of(value: float) -> Level:
    """Return the level of an AUC.

    Example:
        >>> level_of(0.8), level_of(0.7), level_of(0.5)
        ('good enough', 'weak', 'useless')
    """
    return "good enough" if value >= GOOD else "weak" if value >= WEAK else "useless"


def decide(
    result: ScorerResult, placement: Placement, pairs: Sequence[ScorerPair], num_pictures: int, config: RunConfig
) -> Verdict:
    """Return the verdict on one scorer.

    Args:
        result: Its AUCs.
        placement: Where the zero line and margin of ``config`` lie among its contrasts.
        pairs: Comparisons with other scorers.
        num_pictures: Number of pictures.
        config: Configuration that the scorer is meant for.
    """
    sentence, claim = result.sentences[0], result.claims[0]
    levels = [_level(one, num_pictures) for one in (sentence, claim)]
    habit = next((one for one in result.claims if one.group == "against habit"), None)
    if _is_blind(habit) and levels[1] == "good enough":
        levels[1] = "weak"
    reason = _why_not(sentence, claim, num_pictures)
    parts = [_described("By sentence", sentence.auc, levels[0]), _described("By claim", claim.auc, levels[1])]
    summary = " ".join([*([reason] if reason else []), *parts])
    advice = list(_advice(result, placement, levels, num_pictures, config))
    advice += _pair_advice(result.name, pairs)
    return Verdict(result.name, levels[0], levels[1], summary, tuple(advice))


def _level(one: Separation, num_pictures: int) -> Level:
    if one.auc is None or num_pictures < MIN_PICTURES or one.auc.num_false < MIN_FALSE:
        return "not decided"
    return level_of(one.auc.value)


def _why_not(sentence: Separation, claim: Separation, num_pictures: int) -> str:
    """Return why there is no verdict, or none on one of both; empty if there is one."""
    if num_pictures < MIN_PICTURES:
        return f"{num_pictures} pictures are too few for a verdict, which needs {MIN_PICTURES}; read the intervals."
    if sentence.false.n == 0 and claim.false.n == 0:
        return "The captions name no object that is not in its picture, so nothing can be said about false ones."
    rare = [
        f"{one.false.n} false {name}" for name, one in (("sentences", sentence), ("claims", claim))
        if one.false.n < MIN_FALSE
    ]  # fmt: skip
    return f"{' and '.join(rare)} are too few for a verdict, which needs {MIN_FALSE}." if rare else ""


def _described(name: str, auc: Auc | None, level: Level) -> str:
    if auc is None:
        return f"{name}: no AUC, because there are only true or only false texts."
    text = f"{name}: AUC {auc.value:.2f} ({auc.low:.2f} to {auc.high:.2f})"
    if level == "not decided":
        return f"{text}, no verdict."
    ends = {level_of(auc.low), level_of(auc.high)}
    if len(ends) > 1:
        lowest, highest = level_of(auc.low), level_of(auc.high)
        return f"{text}, {level}, but the interval reaches from {lowest} to {highest}."
    return f"{text}, {level}: {_ratio(auc.value)}."


def _ratio(value: float) -> str:
    if value >= 0.995:
        return "hardly a wrong decision"
    if value <= 0.5:
        return "no more right decisions than wrong ones"
    return f"{value / (1 - value):.1f} right decisions for each wrong one"


def _is_blind(habit: Separation | None) -> bool:
    """Return whether claims that habit suggests score about as high as true ones."""
    return habit is not None and habit.auc is not None and habit.auc.num_false >= MIN_FALSE and habit.auc.value < WEAK


def _advice(
    result: ScorerResult, placement: Placement, levels: Sequence[Level], num_pictures: int, config: RunConfig
) -> Iterator[str]:
    sentence, claim = result.sentences[0].auc, result.claims[0].auc
    decided = [level for level in levels if level != "not decided"]
    if not decided:
        yield "Label and caption more pictures, with the policy that will be trained: 200 usually suffice."
        return
    if all(level == "useless" for level in decided):
        yield "Do not train with this scorer: it would teach noise. Try another one, such as a larger SigLIP."
        return
    yield from _more_pictures((sentence, claim), num_pictures)
    if (
        config.method.reward.unit == "sentence"
        and sentence
        and claim
        and claim.low > sentence.value
        and claim.value - sentence.value >= 0.05
    ):
        yield (
            f"Judge claims, not whole sentences: the scorer tells {claim.value:.0%} of pairs of claims apart, but "
            f"{sentence.value:.0%} of pairs of sentences. Use method.reward.unit=claim."
        )
    habit = next((one for one in result.claims if one.group == "against habit"), None)
    if _is_blind(habit):
        assert habit is not None
        assert habit.auc is not None
        yield (
            f"The scorer errs in favor of habit: AUC {habit.auc.value:.2f} against false claims that the picture's "
            "objects suggest. Training would strengthen the habit; add a second scorer of another kind."
        )
    yield from _placement_advice(placement, config)


def _more_pictures(aucs: Sequence[Auc | None], num_pictures: int) -> Iterator[str]:
    """Say how many pictures would narrow the intervals that reach into another level."""
    unclear = [auc for auc in aucs if auc is not None and level_of(auc.low) != level_of(auc.high)]
    if unclear:
        half = max((auc.high - auc.low) / 2 for auc in unclear)
        if half > _WANTED_HALF_WIDTH:
            needed = math.ceil(num_pictures * (half / _WANTED_HALF_WIDTH) ** 2 / 50) * 50
            yield f"Label about {needed} pictures for intervals of ±{_WANTED_HALF_WIDTH}; there are {num_pictures}."


def _placement_advice(placement: Placement, config: RunConfig) -> Iterator[str]:
    own, *tried = placement.margins
    if own.end_over_true > _FEW_ENDS * placement.num_true:
        wider = [one for one in tried if one.min_margin > own.min_margin]
        enough = next((one for one in wider if one.end_over_true <= _FEW_ENDS * placement.num_true), None)
        yield (
            f"Under the preset {config.preset}, ending the response is preferred to {own.end_over_true} of "
            f"{placement.num_true} true details, so responses may get shorter."
            + (f" method.pairs.min_margin={enough.min_margin:g} leaves {enough.end_over_true}." if enough else "")
            + " Compare settings on the measured profile before training."
        )
    if _right_share(own) < GOOD:
        wider = [one for one in tried if one.min_margin > own.min_margin and _right_share(one) >= GOOD]
        enough = next((one for one in wider if one.right + one.wrong >= MIN_FALSE), None)
        if enough is not None:
            yield (
                f"Raise method.pairs.min_margin from {own.min_margin:g} to {enough.min_margin:g}: "
                f"{_counts(enough)} decisions instead of {_counts(own)}."
            )


def _right_share(outcome: MarginOutcome) -> float:
    decided = outcome.right + outcome.wrong
    return outcome.right / decided if decided else 1.0


def _counts(outcome: MarginOutcome) -> str:
    return f"{outcome.right} right : {outcome.wrong} wrong"


def _pair_advice(name: str, pairs: Sequence[ScorerPair]) -> Iterator[str]:
    for pair in pairs:
        if name not in (pair.first, pair.second):
            continue
        both = f"{pair.first}+{pair.second}"
        for of, gain in (("sentence", pair.gain_by_sentence), ("claim", pair.gain_by_claim)):
            if gain is not None and gain.low > 0:
                yield f"By {of}, the mean of both is better than either: use both (scorer.use={both})."
            elif gain is not None and gain.high < 0:
                yield f"By {of}, the mean of both ({both}) is worse than the better one alone: use that one."
