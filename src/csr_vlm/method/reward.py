"""Compute the rewards R(s) of sentences and R(y) of responses from a prompt's nodes.

The equations are those of the CSR paper (arXiv 2405.14622):

    R_T(s) = prod_o P(r_o | x, r_<o)                  (2)
    R_I(s) = max(100 cos(F_I(x_v), F_T(s)), 0)        (3)
    R(s)   = lambda R_I(s) + (1 - lambda) R_T(s)      (4)
    R(y)   = sum_i R(s_i)

``method.reward`` selects variants of each of them. With ``unit: claim``, R_I(s) is not a cosine but
what the sentence's claims are worth, in nats (:mod:`csr_vlm.method.claim_evidence`):

    R_I(s) = sum over claims c of s not made before of w(e(c))
    w(e)   = min(e, E) if e >= 0, else -F min(-e, E)      E max_evidence, F false_cost

A thing that the sentence gives a color counts with the lower evidence of the two. A sentence without
claims is worth 0, as ending is; one whose claims an earlier sentence made costs ``repeat_penalty``.

Everything here is a pure function of the ledger, so rewards can be recomputed under other settings
without generating again.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean

from csr_vlm.config.schema import MethodConfig, RewardConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Node, NodeStatus, negatives_column
from csr_vlm.method.claim_evidence import Evidence, thing_of

NOT_CANDIDATES = (NodeStatus.DUPLICATE, NodeStatus.FILTERED)
"""Nodes that are recorded but get no reward and enter no pair."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class SentenceReward:
    """Hold the reward of one sentence and its two parts."""

    text: float
    """R_T, times ``text_scale``."""
    image: float
    """R_I: in 0..100, in -200..200 as a contrast, or in nats."""
    total: float
    """R(s), after the baseline and the penalty for repeating."""
    repeated: bool = False
    """Whether an earlier sentence of the response has the same words, or made all its claims."""
    lowest: float = 0.0
    """Evidence for the most doubtful claim that the sentence adds, in nats; 0 without any (``unit: claim``)."""


def text_score(node: Node, config: RewardConfig) -> float:
    """Return R_T(s): ``config.text_score`` times ``config.text_scale``.

    With No tokens r_o, before scaling:

    - ``product``: exp(sum_o log P(r_o)), eq. 2, in 0..1
    - ``geometric_mean``: exp(1/No sum_o log P(r_o)), in 0..1
    - ``mean_logprob``: 1/No sum_o log P(r_o), at most 0
    """
    mean_logprob = node.logprob / max(len(node.token_logprobs), 1)
    if config.text_score == "product":
        score = math.exp(node.logprob)
    elif config.text_score == "geometric_mean":
        score = math.exp(mean_logprob)
    else:
        score = mean_logprob
    return config.text_scale * score


def image_score(node: Node, scorer: str, config: RewardConfig) -> float:
    """Return R_I(s): ``config.image_score``, averaged over the scorers of ``a+b``.

    - ``cosine``: max(100 cos, 0), eq. 3, in 0..100
    - ``contrast``: 100 (cos - mean cos with negative images), in -200..200; about 0 for what
      the image does not show

    Raises:
        CsrError: A cosine is missing or not finite.
    """
    names, location = scorer.split("+"), _location(node)
    if config.image_score == "contrast":
        return 100.0 * contrast(node.cosines, scorer, location)
    return fmean(max(100.0 * _cosine(node.cosines, name, location), 0.0) for name in names)


def contrast(cosines: Mapping[str, float], scorer: str, location: str) -> float:
    """Return cos - mean cos with negative images, in -2..2, averaged over the scorers of ``a+b``.

    Args:
        cosines: Cosines of one sentence, by ledger column.
        scorer: Columns to use.
        location: Where the sentence comes from, for error messages.

    Raises:
        CsrError: A cosine is missing or not finite.
    """
    names = scorer.split("+")
    return fmean(
        _cosine(cosines, name, location) - _cosine(cosines, negatives_column(name), location) for name in names
    )


def _location(node: Node) -> str:
    return f"prompt {node.prompt_id}: sentence {node.node_id}"


def _cosine(cosines: Mapping[str, float], column: str, location: str) -> float:
    cosine = cosines.get(column)
    if cosine is None:
        raise CsrError(
            f"{location} has no score by {column!r}",
            "score the run first; contrasts require scorer.others above 0 and at least two images",
        )
    if not math.isfinite(cosine):
        raise CsrError(f"{location}: the score by {column!r} is {cosine}")
    return cosine


def sentence_rewards(nodes: Sequence[Node], method: MethodConfig, scorer: str) -> dict[str, SentenceReward]:
    """Compute R(s) of every sentence of one prompt, by node id.

    R(s) = fuse(R_I(s), R_T(s)) - baseline - penalty, where the penalty applies to sentences
    that repeat an earlier sentence of their response. Nodes without a sentence (they only end
    a response), duplicates and filtered candidates have no reward.

    With ``sibling_rank``, a baseline or a penalty, R(s) depends on all the nodes passed.

    Raises:
        CsrError: A cosine is missing or not finite.
    """
    config = method.reward
    if config.unit == "claim":
        return _claim_rewards(nodes, method, scorer)
    sentences = [node for node in nodes if node.sentence and node.status not in NOT_CANDIDATES]
    text = [text_score(node, config) for node in sentences]
    image = [image_score(node, scorer, config) for node in sentences]
    baseline = _baseline(image, text, method)
    by_id = {node.node_id: node for node in nodes}
    rewards = [
        SentenceReward(text=r_t, image=r_i, total=fused - baseline, repeated=repeats_earlier(node, by_id))
        for node, r_t, r_i, fused in zip(sentences, text, image, _fuse(sentences, image, text, method), strict=True)
    ]
    penalty = config.repeat_penalty * reward_scale(rewards, method)
    return {
        node.node_id: replace(reward, total=reward.total - penalty) if reward.repeated else reward
        for node, reward in zip(sentences, rewards, strict=True)
    }


def _claim_rewards(nodes: Sequence[Node], method: MethodConfig, scorer: str) -> dict[str, SentenceReward]:
    """Compute R(s) from the evidence for the claims of each sentence; R_T counts relative to its mean."""
    config, evidence = method.reward, Evidence.of(nodes, method.reward, scorer).nats
    sentences = [node for node in nodes if node.sentence and node.status not in NOT_CANDIDATES]
    by_id = {node.node_id: node for node in nodes}
    text = [text_score(node, config) for node in sentences]
    zero = (1 - method.lambda_) * fmean(text) if text else 0.0
    rewards = {}
    for node, r_t in zip(sentences, text, strict=True):
        claims = new_claims(node, by_id, evidence)
        added = [_bounded(evidence[claim], config) for claim in claims]
        worth = sum(worth_of(evidence[claim], config) for claim in claims)
        repeated = repeats_claims(node, by_id) or repeats_earlier(node, by_id)
        penalty = config.repeat_penalty * repeated
        total = method.lambda_ * worth + (1 - method.lambda_) * r_t - zero - penalty
        rewards[node.node_id] = SentenceReward(r_t, worth, total, repeated, min(added, default=0.0))
    return rewards


def new_claims(node: Node, by_id: Mapping[str, Node], evidence: Mapping[str, float]) -> list[str]:
    """List the claims that a node makes first on its path; a thing with a color counts with the lower evidence of both.

    Args:
        node: Node of a tree.
        by_id: All nodes of the tree.
        evidence: Evidence for each claim of the tree.
    """
    before = {thing_of(claim) for earlier in path_ids(node.node_id)[:-1] for claim in by_id[earlier].claims}
    lowest: dict[str, str] = {}
    for claim in node.claims:
        thing = thing_of(claim)
        if thing not in before and (thing not in lowest or evidence[claim] < evidence[lowest[thing]]):
            lowest[thing] = claim
    return list(lowest.values())


def worth_of(evidence: float, config: RewardConfig) -> float:
    """Return w(e) of a claim."""
    bounded = _bounded(evidence, config)
    return bounded if bounded >= 0 else config.false_cost * bounded


def _bounded(evidence: float, config: RewardConfig) -> float:
    return max(-config.max_evidence, min(evidence, config.max_evidence))


def _fuse(
    sentences: Sequence[Node], image: Sequence[float], text: Sequence[float], method: MethodConfig
) -> list[float]:
    """Fuse R_I and R_T of each sentence.

    - ``weighted``: lambda R_I + (1 - lambda) R_T, eq. 4
    - ``sibling_rank``: -(lambda rank(R_I) + (1 - lambda) rank(R_T)), see :func:`_sibling_ranks`
    """
    weight = method.lambda_
    if method.reward.fusion == "weighted":
        return [weight * r_i + (1 - weight) * r_t for r_i, r_t in zip(image, text, strict=True)]
    image_ranks, text_ranks = _sibling_ranks(sentences, image), _sibling_ranks(sentences, text)
    # The best rank is the lowest, but rewards must increase with quality.
    return [-(weight * i + (1 - weight) * t) for i, t in zip(image_ranks, text_ranks, strict=True)]


def _sibling_ranks(nodes: Sequence[Node], scores: Sequence[float]) -> list[float]:
    """Rank each node among its n siblings: 1/n for the highest score, 1 for the lowest; ties go by node order."""
    siblings: dict[str, list[int]] = defaultdict(list)
    for index, node in enumerate(nodes):
        siblings[node.parent_id].append(index)
    ranks = [0.0] * len(nodes)
    for indices in siblings.values():
        best_first = sorted(indices, key=lambda index: -scores[index])
        for rank, index in enumerate(best_first, start=1):
            ranks[index] = rank / len(indices)
    return ranks


def _baseline(image: Sequence[float], text: Sequence[float], method: MethodConfig) -> float:
    """Return the fused reward of a sentence that is neither good nor bad.

    - ``none``: 0
    - ``half_best``: lambda max(R_I) / 2 + (1 - lambda) mean(R_T) over the prompt's sentences
    """
    if method.reward.baseline == "none" or not image:
        return 0.0
    return method.lambda_ * max(image) / 2 + (1 - method.lambda_) * fmean(text)


def reward_scale(rewards: Iterable[SentenceReward], method: MethodConfig) -> float:
    """Return max R(s) - min R(s) over a prompt's sentences, the unit of penalties and margins; by claim, lambda.

    Repeated sentences are left out. With the baseline ``half_best`` the minimum includes the
    reward of a sentence unrelated to the image, -lambda max(R_I) / 2. Otherwise the scale
    would shrink, and small differences would count as large ones, where all sentences are good.
    """
    if method.reward.unit == "claim":
        return method.lambda_
    distinct = [reward for reward in rewards if not reward.repeated]
    if not distinct:
        return 0.0
    totals = [reward.total for reward in distinct]
    if method.reward.baseline == "half_best":
        totals.append(-method.lambda_ * max(reward.image for reward in distinct) / 2)
    return max(totals) - min(totals)


def response_reward(totals: Iterable[float], config: RewardConfig) -> float:
    """Compute R(y) from the rewards R(s_i) of its n sentences; 0 if there are none.

    - ``sum``: sum_i R(s_i)
    - ``mean``: 1/n sum_i R(s_i)
    - ``mean_plus_one``: 1/(n+1) sum_i R(s_i)
    """
    values = list(totals)
    if not values:
        return 0.0
    if config.response == "sum":
        return sum(values)
    if config.response == "mean":
        return sum(values) / len(values)
    return sum(values) / (len(values) + 1)


def path_ids(node_id: str) -> list[str]:
    """Return the node ids of a response, from its first sentence to the given node.

    Example:
        >>> path_ids("2.0.3")
        ['2', '2.0', '2.0.3']
    """
    parts = node_id.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def repeats_earlier(node: Node, by_id: Mapping[str, Node]) -> bool:
    """Return whether an earlier sentence on the node's path has the same multiset of words."""
    words = bag_of_words(node.sentence)
    return any(words == bag_of_words(by_id[earlier].sentence) for earlier in path_ids(node.node_id)[:-1])


def repeats_claims(node: Node, by_id: Mapping[str, Node]) -> bool:
    """Return whether one earlier sentence on the node's path made all its claims.

    A sentence that relates things of different sentences is no repetition.
    """
    things = {thing_of(claim) for claim in node.claims}
    earlier = ({thing_of(c) for c in by_id[node_id].claims} for node_id in path_ids(node.node_id)[:-1])
    return bool(things) and any(things <= those for those in earlier)


@lru_cache(maxsize=1 << 12)  # the sentences of a tree are compared with each other many times
def bag_of_words(text: str) -> tuple[str, ...]:
    """Return the lower-cased words of a text in alphabetical order, repeated words included.

    Example:
        >>> bag_of_words("The cat, the DOG.")
        ('cat', 'dog', 'the', 'the')
    """
    return tuple(sorted(_WORD.findall(text.lower())))
