"""Signs of quality that need no truth, and what they say about a run.

Before training, the iteration's ledger and pairs are looked at: do the pairs prefer what
suits the image, or merely what is short, long or said twice? After training, the
responses of base and new policy to prompts that nobody trained on are compared. Each metric
has a bound at which it warns and one at which it stops; docs/method.md has the settings
that were used to find them, those that collapsed and those that worked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from statistics import correlation, fmean
from typing import Any

from csr_vlm.config.schema import MethodConfig
from csr_vlm.core.records import Node, Pair, negatives_column
from csr_vlm.method.pairs import responses
from csr_vlm.method.reward import (
    NOT_CANDIDATES,
    bag_of_words,
    path_ids,
    reward_scale,
    sentence_rewards,
)


class Verdict(StrEnum):
    GO = "go"
    WARN = "warn"
    STOP = "stop"


@dataclass(frozen=True)
class Check:
    """One metric, and what it means."""

    metric: str
    value: float
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Bound:
    """Beyond ``warn`` a metric warns, from ``stop`` on it stops; ``high`` metrics are bad above.

    So a gap of exactly nothing is well where ``warn`` is 0.
    """

    warn: float
    stop: float
    high: bool
    reason: str

    def judge(self, value: float) -> Verdict:
        side = 1 if self.high else -1
        if side * value >= side * self.stop:
            return Verdict.STOP
        return Verdict.WARN if side * value > side * self.warn else Verdict.GO


_NEVER = math.inf
SCORER_BOUND = Bound(
    0.75,
    0.55,
    False,
    "the scorer finds only {value:.2f} of the sentences to suit their own picture better than others, 0.5 is chance: "
    "either the model does not describe its pictures, or another scorer is needed (docs/scorers.md)",
)
"""Of what is known of the scorer without any truth, ``scorer_agreement``; set with scorers of graded quality
(docs/evidence): one whose AUC was 0.63 had 0.73 and cost recall, those from 0.82 up had 0.84."""
PAIR_BOUNDS = {
    "scorer_agreement": SCORER_BOUND,
    "relevance_win": Bound(
        0.90, 0.80, False, "what is chosen hardly suits the image better than what is rejected: {value:.2f} of pairs"
    ),
    "omission_gap": Bound(
        0.0, 0.05, True, "what is chosen leaves out more of what was seen than what is rejected: {value:+.2f} a pair"
    ),
    "repeat_gap": Bound(0.0, 0.08, True, "what is chosen says more things twice than what is rejected: {value:+.2f}"),
    "length_correlation": Bound(
        0.55, 0.9, True, "length decides: the rewards of a prompt's responses go with their length, r = {value:+.2f}"
    ),
    "prompts_with_pairs": Bound(
        0.10, 0.03, False, "hardly a prompt has a pair left: {value:.2f} of them; there is nothing more to learn"
    ),
}
"""Signs of an iteration's pairs, in the order they are shown."""
RESPONSE_BOUNDS = {
    "sentences_ratio": Bound(
        0.80, 0.65, False, "responses have shrunk to {value:.2f} of the base model's: the policy falls silent"
    ),
    "relevance_gain": Bound(-0.5, -1.5, False, "responses suit their images less than the base's: R_I {value:+.1f}"),
    "repeats_gain": Bound(0.10, 0.30, True, "responses say more things twice than the base's: {value:+.2f} each"),
    "unfinished_gain": Bound(0.10, 0.30, True, "more responses come to no end than the base's: {value:+.2f} of them"),
    "chosen_drop": Bound(1.0, _NEVER, True, "training made the chosen responses less likely, by {value:.2f} nats each"),
}
"""Signs of a trained policy, against the base model's."""


@dataclass(frozen=True)
class TreeMetrics:
    """What one prompt's tree and pairs show; sums and counts, so that prompts can be pooled."""

    pairs: int
    wins: int
    losses: int
    margin: float
    length_gap: int
    omission_gap: int
    repeat_gap: int
    correlation: float | None
    own_above_others: float | None


def tree_metrics(nodes: Sequence[Node], pairs: Sequence[Pair], method: MethodConfig, scorer: str) -> TreeMetrics:
    """Look at one prompt's tree and the pairs made of it."""
    by_id = {node.node_id: node for node in nodes}
    sentences = [node for node in nodes if node.sentence and node.status not in NOT_CANDIDATES]
    seen = _seen(sentences, scorer)
    rewards = sentence_rewards(nodes, method, scorer)
    scale = reward_scale(rewards.values(), method)
    # A sentence that suits the image counts 1, one that does not -1, one said before nothing.
    points = {
        node.node_id: 0 if rewards[node.node_id].repeated else 1 if bag_of_words(node.sentence) in seen else -1
        for node in sentences
    }
    wins = losses = length = omission = repeats = 0
    for pair in pairs:
        sides = [_said(by_id, side.node_id) for side in (pair.chosen, pair.rejected)]
        chosen, rejected = (sum(points.get(node.node_id, 0) for node in side) for side in sides)
        wins += chosen > rejected
        losses += chosen < rejected
        words = [{bag_of_words(node.sentence) for node in side} for side in sides]
        length += len(sides[0]) - len(sides[1])
        omission += len(seen - words[0]) - len(seen - words[1])
        repeats += (len(sides[0]) - len(words[0])) - (len(sides[1]) - len(words[1]))
    return TreeMetrics(
        pairs=len(pairs),
        wins=wins,
        losses=losses,
        margin=sum(pair.margin for pair in pairs) / scale if scale else 0.0,
        length_gap=length,
        omission_gap=omission,
        repeat_gap=repeats,
        # Between siblings R(y) decides nothing: where most candidates are false, to end is right.
        correlation=_length_correlation(nodes, method, scorer) if method.pairs.between == "responses" else None,
        own_above_others=_own_above_others(sentences, scorer),
    )


def pair_metrics(trees: Iterable[TreeMetrics]) -> dict[str, float]:
    """Pool the prompts of an iteration.

    ``relevance_win``: of the pairs whose sides differ in it, the share whose chosen side says
    more of what suits the image, less what does not; 0.5 is chance. ``omission_gap``,
    ``repeat_gap``, ``length_gap``: chosen less rejected, a pair, in sentences of the tree that
    suit the image and are left out, in repeats, in sentences. ``margin``: mean reward margin
    in units of the prompt's scale.
    ``length_correlation``: mean over prompts of Pearson's r between R(y) and the number of
    sentences, where pairs are of whole responses. ``scorer_agreement``: share of sentences
    that suit their own image better than the average other one; it needs a ledger with
    :func:`others_column`. What nothing is known of is left out.
    """
    found = list(trees)
    num_pairs = sum(tree.pairs for tree in found)
    metrics = {
        "prompts_with_pairs": fmean(tree.pairs > 0 for tree in found) if found else 0.0,
        "pairs": float(num_pairs),
    }
    if num_pairs:
        metrics |= {
            "margin": sum(tree.margin for tree in found) / num_pairs,
            "length_gap": sum(tree.length_gap for tree in found) / num_pairs,
            "omission_gap": sum(tree.omission_gap for tree in found) / num_pairs,
            "repeat_gap": sum(tree.repeat_gap for tree in found) / num_pairs,
        }
    wins, losses = (sum(getattr(tree, name) for tree in found) for name in ("wins", "losses"))
    if wins + losses:
        metrics["relevance_win"] = wins / (wins + losses)
    for name, values in (
        ("length_correlation", [tree.correlation for tree in found if tree.correlation is not None]),
        ("scorer_agreement", [tree.own_above_others for tree in found if tree.own_above_others is not None]),
    ):
        if values:
            metrics[name] = fmean(values)
    return metrics


def response_metrics(
    base: Mapping[str, float], now: Mapping[str, float], chosen_change: float | None
) -> dict[str, float]:
    """Compare the policy's responses to held-out prompts with the base model's.

    Args:
        base: ``sentences``, ``relevance``, ``repeats``, ``complete``: means over responses.
        now: The same of the policy.
        chosen_change: Mean change of the chosen responses' log-probability in training, nats.
    """
    return {
        **({"sentences_ratio": now["sentences"] / base["sentences"]} if base["sentences"] else {}),
        "relevance_gain": now["relevance"] - base["relevance"],
        "repeats_gain": now["repeats"] - base["repeats"],
        "unfinished_gain": base["complete"] - now["complete"],
        **({} if chosen_change is None else {"chosen_drop": -chosen_change}),
    }


def checks(metrics: Mapping[str, float], bounds: Mapping[str, Bound]) -> list[Check]:
    """Judge every metric that has a bound."""
    found = []
    for metric, bound in bounds.items():
        if metric in metrics:
            value = abs(metrics[metric]) if metric == "length_correlation" else metrics[metric]
            verdict = bound.judge(value)
            reason = "" if verdict is Verdict.GO else bound.reason.format(value=metrics[metric])
            found.append(Check(metric, metrics[metric], verdict, reason))
    return found


def worst(found: Iterable[Check]) -> Verdict:
    """Return the verdict of the gravest check."""
    order = list(Verdict)
    return max((check.verdict for check in found), key=order.index, default=Verdict.GO)


def dump(found: Sequence[Check]) -> list[dict[str, Any]]:
    return [asdict(check) | {"verdict": check.verdict.value} for check in found]


def _said(by_id: Mapping[str, Node], node_id: str) -> list[Node]:
    return [by_id[part] for part in path_ids(node_id) if by_id[part].sentence]


def _seen(sentences: Sequence[Node], scorer: str) -> set[tuple[str, ...]]:
    """Collect the sentences, as bags of words, that suit the image.

    Where the ledger has the cosines with other images, those whose contrast is above half of
    the best; otherwise those whose cosine is above the middle of the tree's.
    """
    name = scorer.partition("+")[0]
    by_words = {bag_of_words(node.sentence): node.cosines for node in reversed(sentences)}
    if not by_words:
        return set()
    if all(negatives_column(name) in cosines for cosines in by_words.values()):
        values = {words: cosines[name] - cosines[negatives_column(name)] for words, cosines in by_words.items()}
        middle = max(values.values()) / 2
    else:
        values = {words: cosines[name] for words, cosines in by_words.items()}
        middle = (min(values.values()) + max(values.values())) / 2
    return {words for words, value in values.items() if value > middle}


def _length_correlation(nodes: Sequence[Node], method: MethodConfig, scorer: str) -> float | None:
    by_text = {r.text: r for r in responses(nodes, method, scorer) if r.complete}
    lengths = [r.num_sentences for r in by_text.values()]
    rewards = [r.reward for r in by_text.values()]
    if len(lengths) < 3 or len(set(lengths)) < 2 or len(set(rewards)) < 2:
        return None
    return correlation(lengths, rewards)


def _own_above_others(sentences: Sequence[Node], scorer: str) -> float | None:
    names = scorer.split("+")
    gaps = [
        sum(node.cosines[name] - node.cosines[negatives_column(name)] for name in names)
        for node in {bag_of_words(node.sentence): node for node in sentences}.values()
        if all(negatives_column(name) in node.cosines for name in names)
    ]
    return fmean((gap > 0) + (gap == 0) / 2 for gap in gaps) if gaps else None
