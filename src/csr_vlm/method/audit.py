"""Check the quality of a run without labels.

Before training, the iteration's ledger and pairs are checked: do the pairs prefer sentences
that suit the image, or merely short, long or repeated ones? After training, the responses of
the base model and the new policy to held-out prompts are compared. Each metric has a bound from
which it warns and one from which it stops the run; docs/method.md lists the settings that the
bounds were derived from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from statistics import correlation, fmean
from typing import Any

from csr_vlm.config.schema import MethodConfig
from csr_vlm.core.records import Node, Pair, Response, negatives_column
from csr_vlm.method.claim_signs import ClaimSigns, claim_signs
from csr_vlm.method.pairs import responses
from csr_vlm.method.reward import (
    NOT_CANDIDATES,
    bag_of_words,
    path_ids,
    reward_scale,
    sentence_rewards,
)
from csr_vlm.method.scorer_quality import estimated_auc


class Verdict(StrEnum):
    """Enumerate the results of a check, in order of severity."""

    GO = "go"
    WARN = "warn"
    STOP = "stop"


@dataclass(frozen=True)
class Check:
    """Hold the result of comparing one metric with its bound."""

    metric: str
    value: float | None
    """None where the metric is undefined though it must have a value."""
    verdict: Verdict
    reason: str
    """Why the metric warns or stops; empty for ``go``."""
    n: int | None = None
    """Number of pairs, prompts or responses that the metric is the mean of; None if it was not recorded."""


TOO_FEW = "too few"
FEWEST = 8
"""Number of cases below which a check that passes is shown as too few; with fewer responses, a gate only warns."""


def shown_verdict(verdict: str, n: int | None) -> str:
    """Return a verdict as people read it: passing on a handful of cases says nothing.

    Example:
        >>> shown_verdict("go", 2), shown_verdict("go", 20), shown_verdict("warn", 2)
        ('too few', 'go', 'warn')
    """
    return TOO_FEW if verdict == Verdict.GO and n is not None and n < FEWEST else verdict


@dataclass(frozen=True)
class Bound:
    """Define from which value on a metric warns or stops.

    A metric warns beyond ``warn`` and stops from ``stop`` on. A value equal to ``warn`` passes,
    so a gap of exactly 0 passes where ``warn`` is 0.
    """

    warn: float
    stop: float
    higher_is_worse: bool
    reason: str
    """Template of the reason; ``{value}`` is the metric."""

    def judge(self, value: float) -> Verdict:
        """Return the verdict on a value."""
        sign = 1 if self.higher_is_worse else -1
        if sign * value >= sign * self.stop:
            return Verdict.STOP
        return Verdict.WARN if sign * value > sign * self.warn else Verdict.GO

    def explain(self, value: float) -> str:
        """Return why a value warns or stops, with the value and the bounds."""
        return f"{self.reason.format(value=value)} ({self})"

    def __str__(self) -> str:
        beyond, reached = ("above", "or more") if self.higher_is_worse else ("below", "or less")
        stop = f", {self.stop:g} {reached} stops" if math.isfinite(self.stop) else ""
        return f"{beyond} {self.warn:g} warns{stop}"


_NEVER = math.inf
PAIR_BOUNDS = {
    # Derived from scorers of graded quality (docs/evidence): one with an AUC of 0.63 had 0.73 and reduced recall, those
    # with an AUC of at least 0.82 had at least 0.84.
    "scorer_agreement": Bound(
        warn=0.75,
        stop=0.55,
        higher_is_worse=False,
        reason="the scorer rates only {value:.2f} of the sentences higher for their own image than for negative images "
        "(0.5 is chance): the model does not describe its images, or another scorer is needed (docs/scorers.md)",
    ),
    "relevance_win": Bound(
        warn=0.90,
        stop=0.80,
        higher_is_worse=False,
        reason="the chosen side suits the image better than the rejected side in only {value:.2f} of the pairs",
    ),
    "omission_gap": Bound(
        warn=0.0,
        stop=0.05,
        higher_is_worse=True,
        reason="chosen sides omit more of the sentences that suit the image than rejected sides: {value:+.2f} per pair",
    ),
    "repeat_gap": Bound(
        warn=0.0,
        stop=0.08,
        higher_is_worse=True,
        reason="chosen sides repeat more sentences than rejected sides: {value:+.2f} per pair",
    ),
    "length_correlation": Bound(
        warn=0.55,
        stop=0.9,
        higher_is_worse=True,
        reason="the rewards of a prompt's responses correlate with their length: r = {value:+.2f}",
    ),
    "claim_agreement": Bound(
        warn=0.62,
        stop=0.55,
        higher_is_worse=False,
        reason="the scorer rates only {value:.2f} of the claims higher for their own image than for negative images "
        "(0.5 is chance): the model does not describe its images, or another scorer is needed (docs/scorers.md)",
    ),
    "nearest_agreement": Bound(
        warn=0.515,
        stop=0.495,
        higher_is_worse=False,
        reason="the scorer rates only {value:.2f} of the claims higher for their own image than for the most similar "
        "other images (0.5 is chance): it sees what kind of picture it is, not what is in it (docs/scorers.md)",
    ),
    "cue_agreement": Bound(
        warn=0.53,
        stop=0.50,
        higher_is_worse=False,
        reason="of two claims about an image, the scorer prefers the one that the model makes more often only "
        "{value:.2f} of the time (0.5 is chance): scorer and model do not agree on what is there",
    ),
    "second_win": Bound(
        warn=0.65,
        stop=0.55,
        higher_is_worse=False,
        reason="a second scorer, which did not choose the pairs, prefers the chosen side in only {value:.2f} of them "
        "(0.5 is chance)",
    ),
    "prompts_with_pairs": Bound(
        warn=0.10, stop=0.03, higher_is_worse=False, reason="too few prompts yield pairs: {value:.2f} of them"
    ),
}
"""Bounds of the metrics of an iteration's pairs, in display order."""
RESPONSE_BOUNDS = {
    "sentences_ratio": Bound(
        warn=0.80,
        stop=0.65,
        higher_is_worse=False,
        reason="responses collapse: they have {value:.2f} times as many sentences as those of the base model",
    ),
    "relevance_gain": Bound(
        warn=-0.5,
        stop=-1.5,
        higher_is_worse=False,
        reason="responses suit their images less than those of the base model: R_I {value:+.1f}",
    ),
    "repeats_gain": Bound(
        warn=0.10,
        stop=0.30,
        higher_is_worse=True,
        reason="responses repeat more sentences than those of the base model: {value:+.2f} per response",
    ),
    "unfinished_gain": Bound(
        warn=0.10,
        stop=0.30,
        higher_is_worse=True,
        reason="more responses are cut off by a limit than with the base model: {value:+.2f} of them",
    ),
    "chosen_drop": Bound(
        warn=1.0,
        stop=_NEVER,
        higher_is_worse=True,
        reason="training reduced the log-probability of the chosen responses by {value:.2f} nats on average",
    ),
}
"""Bounds of the metrics of a trained policy, compared with the base model."""
_SOURCES = {
    "sentences": "sentences_ratio",
    "relevance": "relevance_gain",
    "repeats": "repeats_gain",
    "complete": "unfinished_gain",
}
"""Metric of held-out responses to the metric that compares it with the base model."""


@dataclass(frozen=True)
class TreeMetrics:
    """Hold the metrics of one prompt's tree and pairs, as sums and counts that can be pooled over prompts.

    Gaps are sums over pairs of (chosen - rejected).
    """

    pairs: int
    wins: int
    """Pairs whose chosen side suits the image better."""
    losses: int
    """Pairs whose rejected side suits the image better."""
    margin: float
    """Sum of the margins, in units of :func:`csr_vlm.method.reward.reward_scale`."""
    length_gap: int
    """In sentences."""
    omission_gap: int
    """In sentences that suit the image and that the side does not contain."""
    repeat_gap: int
    """In repeated sentences."""
    correlation: float | None
    """Pearson's r between R(y) and the number of sentences; None if undefined, or between siblings."""
    scorer_agreement: float | None
    """Fraction of distinct sentences whose cosine exceeds the mean over negative images; None without these."""
    claims: ClaimSigns | None = None
    """None unless ``reward.unit`` is ``claim``; then there is no relevance of sentences."""


@dataclass(frozen=True)
class _Side:
    """Hold the counts of one side of a pair."""

    score: int
    """Sentences that suit the image minus those that do not; repeated ones count 0."""
    length: int
    omissions: int
    repeats: int


def tree_metrics(nodes: Sequence[Node], pairs: Sequence[Pair], method: MethodConfig, scorer: str) -> TreeMetrics:
    """Compute the metrics of one prompt's tree and of the pairs derived from it.

    Raises:
        CsrError: A cosine is missing or not finite.
    """
    if method.reward.unit == "claim":
        return _claim_metrics(nodes, pairs, method, scorer)
    by_id = {node.node_id: node for node in nodes}
    sentences = [node for node in nodes if node.sentence and node.status not in NOT_CANDIDATES]
    relevant = _relevant_sentences(sentences, scorer)
    rewards = sentence_rewards(nodes, method, scorer)
    scale = reward_scale(rewards.values(), method)
    scores = {
        node.node_id: 0 if rewards[node.node_id].repeated else 1 if bag_of_words(node.sentence) in relevant else -1
        for node in sentences
    }

    def side(response: Response) -> _Side:
        path = [by_id[node_id] for node_id in path_ids(response.node_id) if by_id[node_id].sentence]
        distinct = {bag_of_words(node.sentence) for node in path}
        return _Side(
            score=sum(scores.get(node.node_id, 0) for node in path),
            length=len(path),
            omissions=len(relevant - distinct),
            repeats=len(path) - len(distinct),
        )

    sides = [(side(pair.chosen), side(pair.rejected)) for pair in pairs]
    return TreeMetrics(
        pairs=len(pairs),
        wins=sum(chosen.score > rejected.score for chosen, rejected in sides),
        losses=sum(chosen.score < rejected.score for chosen, rejected in sides),
        margin=sum(pair.margin for pair in pairs) / scale if scale else 0.0,
        length_gap=sum(chosen.length - rejected.length for chosen, rejected in sides),
        omission_gap=sum(chosen.omissions - rejected.omissions for chosen, rejected in sides),
        repeat_gap=sum(chosen.repeats - rejected.repeats for chosen, rejected in sides),
        # Between siblings R(y) decides nothing: where most candidates are false, ending is right.
        correlation=_length_correlation(nodes, method, scorer) if method.pairs.between == "responses" else None,
        scorer_agreement=_scorer_agreement(sentences, scorer),
    )


def _claim_metrics(nodes: Sequence[Node], pairs: Sequence[Pair], method: MethodConfig, scorer: str) -> TreeMetrics:
    """Compute the metrics of one prompt's tree whose rewards are those of claims."""
    rewards = sentence_rewards(nodes, method, scorer)

    def counts(response: Response) -> tuple[int, int]:
        path = [rewards[node_id] for node_id in path_ids(response.node_id) if node_id in rewards]
        return len(path), sum(reward.repeated for reward in path)

    sides = [(counts(pair.chosen), counts(pair.rejected)) for pair in pairs]
    return TreeMetrics(
        pairs=len(pairs),
        wins=0,
        losses=0,
        margin=sum(pair.margin for pair in pairs),
        length_gap=sum(chosen[0] - rejected[0] for chosen, rejected in sides),
        omission_gap=0,
        repeat_gap=sum(chosen[1] - rejected[1] for chosen, rejected in sides),
        correlation=_length_correlation(nodes, method, scorer) if method.pairs.between == "responses" else None,
        scorer_agreement=None,
        claims=claim_signs(nodes, pairs, method, scorer),
    )


def pair_metrics(trees: Iterable[TreeMetrics]) -> dict[str, float]:
    """Pool the metrics of an iteration's trees; metrics that are undefined are left out.

    - ``prompts_with_pairs``: fraction of prompts with at least one pair
    - ``pairs``: number of pairs
    - ``margin``: mean reward margin, in units of the prompt's reward scale
    - ``length_gap``, ``omission_gap``, ``repeat_gap``: mean over pairs of (chosen - rejected), in
      sentences, omitted relevant sentences, and repeated sentences
    - ``relevance_win``: wins / (wins + losses); 0.5 is chance
    - ``length_correlation``: mean over prompts of Pearson's r between R(y) and the number of
      sentences, for pairs of whole responses
    - ``scorer_agreement``: mean over prompts of the fraction of sentences whose cosine exceeds
      the mean over negative images; 0.5 is chance

    With ``reward.unit: claim`` there are these instead of the last three and ``omission_gap``, each
    a fraction whose null, 0.5, is what a scorer gives that sees nothing of the image:

    - ``claim_agreement``: things whose cosine exceeds the mean over negative images
    - ``nearest_agreement``: things that are mentioned often and whose cosine exceeds the mean over
      the most similar images
    - ``cue_agreement``: pairs of things of which the one that the policy mentions more often has
      the higher evidence by the scorer
    - ``second_win``: pairs whose chosen side has the higher evidence by a second scorer, which did
      not choose them; only where there is one

    and ``estimated_auc``, the scorer's quality as its agreement with the policy's samples suggests
    (:mod:`csr_vlm.method.scorer_quality`), with the number of ``claims`` that it is from; it has no bound.
    """
    trees = list(trees)
    num_pairs = sum(tree.pairs for tree in trees)
    metrics = {
        "prompts_with_pairs": fmean(tree.pairs > 0 for tree in trees) if trees else 0.0,
        "pairs": float(num_pairs),
    }
    if num_pairs:
        metrics |= {
            "margin": sum(tree.margin for tree in trees) / num_pairs,
            "length_gap": sum(tree.length_gap for tree in trees) / num_pairs,
            "repeat_gap": sum(tree.repeat_gap for tree in trees) / num_pairs,
        }
    signs = [tree.claims for tree in trees if tree.claims is not None]
    if num_pairs and not signs:
        metrics["omission_gap"] = sum(tree.omission_gap for tree in trees) / num_pairs
    for metric, sign in _CLAIM_SIGNS.items():
        cases = [getattr(of_tree, sign) for of_tree in signs]
        if number := sum(total for _, total in cases):
            metrics[metric] = sum(successes for successes, _ in cases) / number
    values = [value for of_tree in signs for value in of_tree.values]
    quality = estimated_auc(values)
    if quality is not None:
        metrics |= {"estimated_auc": quality, "claims": float(len(values))}
    wins, losses = sum(tree.wins for tree in trees), sum(tree.losses for tree in trees)
    if wins + losses:
        metrics["relevance_win"] = wins / (wins + losses)
    if correlations := [tree.correlation for tree in trees if tree.correlation is not None]:
        metrics["length_correlation"] = fmean(correlations)
    if agreements := [tree.scorer_agreement for tree in trees if tree.scorer_agreement is not None]:
        metrics["scorer_agreement"] = fmean(agreements)
    return metrics


_CLAIM_SIGNS = {
    "claim_agreement": "others",
    "nearest_agreement": "nearest",
    "cue_agreement": "cues",
    "second_win": "second",
}
"""Metric of pairs to the sign of a tree that it pools."""
_OPTIONAL = ("length_correlation", "nearest_agreement", "cue_agreement", "second_win")
"""Metrics of pairs that may become undefined: for responses of one length, without similar images or a second scorer,
or where every claim is made once."""


def response_metrics(
    base: Mapping[str, float | None], policy: Mapping[str, float | None], chosen_change: float | None
) -> dict[str, float]:
    """Compare a policy's responses to held-out prompts with those of the base model; leave out what is undefined.

    - ``sentences_ratio``: policy / base
    - ``relevance_gain``, ``repeats_gain``: policy - base
    - ``unfinished_gain``: base - policy, of the fraction of complete responses
    - ``chosen_drop``: -``chosen_change``

    Args:
        base: Means over responses: ``sentences``, ``relevance`` (R_I), ``repeats``, ``complete``; None if undefined.
        policy: The same means of the policy.
        chosen_change: Mean change of log P(chosen) during training in nats; None if unknown.
    """
    metrics: dict[str, float] = {}
    for source, metric in _SOURCES.items():
        before, now = base.get(source), policy.get(source)
        if before is None or now is None:
            continue
        if source == "sentences":
            metrics |= {metric: now / before} if before else {}
        else:
            metrics[metric] = before - now if source == "complete" else now - before
    return metrics | ({} if chosen_change is None else {"chosen_drop": -chosen_change})


def checks(metrics: Mapping[str, float], bounds: Mapping[str, Bound]) -> list[Check]:
    """Compare every metric that has a bound with it."""
    results = []
    for metric, bound in bounds.items():
        if metric in metrics:
            value = metrics[metric]
            verdict = bound.judge(abs(value) if metric == "length_correlation" else value)
            reason = "" if verdict is Verdict.GO else bound.explain(value)
            results.append(Check(metric, value, verdict, reason))
    return results


def response_checks(
    metrics: Mapping[str, float], base: Mapping[str, float | None], policy: Mapping[str, float | None]
) -> list[Check]:
    """Compare the metrics of :func:`response_metrics` with their bounds; stop where one became undefined.

    A policy that says nothing has no relevance, and must not pass for that.
    """
    lost = {source: base[source] for source in _SOURCES if base.get(source) is not None and policy.get(source) is None}
    return checks(metrics, RESPONSE_BOUNDS) + [
        Check(_SOURCES[source], None, Verdict.STOP, f"responses: {source} was {value:.4g} and is undefined now")
        for source, value in lost.items()
    ]


def pair_checks(metrics: Mapping[str, float], first: Mapping[str, float]) -> list[Check]:
    """Compare the metrics of pairs with their bounds; stop where one is undefined that pairs must have.

    Where there are pairs, they must have ``relevance_win`` or ``claim_agreement``, and whatever else
    the first iteration had, except for what may be undefined (``_OPTIONAL``).

    Args:
        metrics: Metrics of :func:`pair_metrics`.
        first: The same metrics of the first iteration; empty if this is the first.
    """
    results = checks(metrics, PAIR_BOUNDS)
    if not metrics.get("pairs"):
        return results
    for metric in PAIR_BOUNDS:
        if metric in metrics or metric in _OPTIONAL:
            continue
        if metric in first:
            reason = f"pairs: {metric} was {first[metric]:.4g} in iteration 1 and is undefined now"
        elif metric == "relevance_win" and "claim_agreement" not in metrics:
            reason = f"pairs: {metric} is undefined: in no pair does one side suit the image better than the other"
        else:
            continue
        results.append(Check(metric, None, Verdict.STOP, reason))
    return results


def worst_verdict(results: Iterable[Check]) -> Verdict:
    """Return the most severe verdict; ``go`` without any check."""
    severity = list(Verdict)
    return max((check.verdict for check in results), key=severity.index, default=Verdict.GO)


def dump(results: Sequence[Check]) -> list[dict[str, Any]]:
    """Return checks as plain data."""
    return [asdict(check) | {"verdict": check.verdict.value} for check in results]


def _relevant_sentences(sentences: Sequence[Node], scorer: str) -> set[tuple[str, ...]]:
    """Return the sentences, as bags of words, that suit the image.

    With cosines over negative images, these are the sentences whose contrast exceeds half of the
    best one; otherwise those whose cosine exceeds the midpoint of the tree's lowest and highest.
    Only the first of several scorers counts.
    """
    column = scorer.partition("+")[0]
    cosines_by_words = {bag_of_words(node.sentence): node.cosines for node in reversed(sentences)}
    if not cosines_by_words:
        return set()
    negatives = negatives_column(column)
    if all(negatives in cosines for cosines in cosines_by_words.values()):
        values = {words: cosines[column] - cosines[negatives] for words, cosines in cosines_by_words.items()}
        threshold = max(values.values()) / 2
    else:
        values = {words: cosines[column] for words, cosines in cosines_by_words.items()}
        threshold = (min(values.values()) + max(values.values())) / 2
    return {words for words, value in values.items() if value > threshold}


def _length_correlation(nodes: Sequence[Node], method: MethodConfig, scorer: str) -> float | None:
    """Return Pearson's r between R(y) and the number of sentences, over distinct complete responses."""
    by_text = {response.text: response for response in responses(nodes, method, scorer) if response.complete}
    lengths = [response.num_sentences for response in by_text.values()]
    rewards = [response.reward for response in by_text.values()]
    if len(lengths) < 3 or len(set(lengths)) < 2 or len(set(rewards)) < 2:
        return None
    return correlation(lengths, rewards)


def _scorer_agreement(sentences: Sequence[Node], scorer: str) -> float | None:
    """Return the fraction of distinct sentences with cos > mean cos over negative images; ties count 1/2.

    Cosines are summed over the scorers of ``a+b``.
    """
    names = scorer.split("+")
    distinct = {bag_of_words(node.sentence): node for node in sentences}.values()
    gaps = [
        sum(node.cosines[name] - node.cosines[negatives_column(name)] for name in names)
        for node in distinct
        if all(negatives_column(name) in node.cosines for name in names)
    ]
    return fmean((gap > 0) + (gap == 0) / 2 for gap in gaps) if gaps else None
