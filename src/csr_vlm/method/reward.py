"""Rewards: from a prompt's nodes to R(s) and R(y). Pure functions of the ledger.

Equations are those of the CSR paper (arXiv 2405.14622):

    R_T(s) = prod_o P(r_o | x, r_<o)                  (2)
    R_I(s) = max(100 cos(F_I(x_v), F_T(s)), 0)        (3)
    R(s)   = lambda R_I(s) + (1 - lambda) R_T(s)      (4)
    R(y)   = sum_i R(s_i)

The configuration can replace R_T's product, the way the two are fused, and the sum.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean, pstdev

from csr_vlm.config.schema import MethodConfig, RewardConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Node, NodeStatus, negatives_column

NOT_CANDIDATES = (NodeStatus.DUPLICATE, NodeStatus.FILTERED)
"""Nodes that are recorded and take no further part."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class SentenceReward:
    """What one sentence earns."""

    text: float
    """R_T, scaled as configured."""
    image: float
    """R_I, in 0..100, or -200..200 as a contrast."""
    total: float
    """R."""
    repeated: bool = False
    """Whether it says again what the response has said."""


def text_score(node: Node, config: RewardConfig) -> float:
    """Return R_T(s), by ``config.text_score`` times ``config.text_scale``.

    ``product``: exp(sum_o log P), eq. 2, in 0..1; ``geometric_mean``: exp(mean_o log P),
    in 0..1; ``mean_logprob``: mean_o log P, at most 0.
    """
    mean = node.logprob / max(len(node.token_logprobs), 1)
    if config.text_score == "product":
        value = math.exp(node.logprob)
    elif config.text_score == "geometric_mean":
        value = math.exp(mean)
    else:
        value = mean
    return config.text_scale * value


def image_score(node: Node, scorer: str, config: RewardConfig) -> float:
    """Return R_I(s), by ``config.image_score``; the mean over scorers where several are named as ``a+b``.

    ``cosine``: max(100 cos, 0), eq. 3. ``contrast``: 100 (cos - mean cos with other images),
    how much better a sentence suits this image than others; what is not there lies about 0.

    Raises:
        CsrError: The node has no score by a scorer, or one that is not finite.
    """
    names = scorer.split("+")
    if config.image_score == "contrast":
        return 100.0 * contrast(node.cosines, scorer, _place(node))
    return fmean(max(100.0 * _cosine(node.cosines, name, _place(node)), 0.0) for name in names)


def contrasts(nodes: Iterable[Node], scorer: str) -> dict[str, float]:
    """Map each node's id to its cosine less the mean cosine with other images, in -2..2."""
    return {node.node_id: contrast(node.cosines, scorer, _place(node)) for node in nodes}


def contrast(cosines: Mapping[str, float], scorer: str, place: str) -> float:
    """Return the cosine less the mean cosine with other images, in -2..2; the mean over scorers.

    Args:
        cosines: One sentence's, by column.
        place: What an error says it is of.
    """
    names = scorer.split("+")
    return fmean(_cosine(cosines, name, place) - _cosine(cosines, negatives_column(name), place) for name in names)


def _place(node: Node) -> str:
    return f"prompt {node.prompt_id}: sentence {node.node_id}"


def _cosine(cosines: Mapping[str, float], scorer: str, place: str) -> float:
    cosine = cosines.get(scorer)
    if cosine is None:
        raise CsrError(
            f"{place} has no score by {scorer!r}",
            "score the run first; a contrast needs scorer.others above 0 and two images or more",
        )
    if not math.isfinite(cosine):
        raise CsrError(f"{place}: the score by {scorer!r} is {cosine}")
    return cosine


def sentence_rewards(nodes: Sequence[Node], method: MethodConfig, scorer: str) -> dict[str, SentenceReward]:
    """Compute R(s) of every sentence of one prompt, by node id.

    Nodes without a sentence (they only end a response), duplicates and filtered candidates
    earn nothing and are left out.
    ``standardised`` takes z-scores over all the nodes given, ``sibling_rank`` ranks among
    the children of one parent; both depend on which nodes are given.
    """
    sentences = [node for node in nodes if node.sentence and node.status not in NOT_CANDIDATES]
    config = method.reward
    text = [text_score(node, config) for node in sentences]
    image = [image_score(node, scorer, config) for node in sentences]
    weight = method.lambda_
    if config.fusion == "weighted":
        fused = [weight * i + (1 - weight) * t for i, t in zip(image, text, strict=True)]
    elif config.fusion == "standardised":
        fused = [weight * i + (1 - weight) * t for i, t in zip(_z_scores(image), _z_scores(text), strict=True)]
    else:
        ranks_image, ranks_text = _sibling_ranks(sentences, image), _sibling_ranks(sentences, text)
        # Ranks run from 1/n, best, to 1: a reward must grow with merit.
        fused = [-(weight * i + (1 - weight) * t) for i, t in zip(ranks_image, ranks_text, strict=True)]
    if config.baseline == "half_best" and sentences:
        nothing = weight * max(image) / 2 + (1 - weight) * fmean(text)
    else:
        nothing = _baseline(sentences, fused, config)
    repeats = _repeats(nodes, sentences)
    rewards = [
        SentenceReward(text=t, image=i, total=value - nothing, repeated=repeated)
        for t, i, value, repeated in zip(text, image, fused, repeats, strict=True)
    ]
    cost = config.repeat_penalty * reward_scale(rewards, method)
    return {
        node.node_id: replace(reward, total=reward.total - cost) if reward.repeated else reward
        for node, reward in zip(sentences, rewards, strict=True)
    }


def reward_scale(rewards: Iterable[SentenceReward], method: MethodConfig) -> float:
    """Return the distance from a prompt's worst sentence to its best: the unit of costs and margins.

    Sentences that repeat are left out. With the baseline ``half_best`` a sentence that is
    not about the image at all, worth -lambda max(R_I) / 2, counts as there: where all
    sentences are good, the distance between two of them is not a large one.
    """
    said = [reward for reward in rewards if not reward.repeated]
    if not said:
        return 0.0
    totals = [reward.total for reward in said]
    if method.reward.baseline == "half_best":
        totals.append(-method.lambda_ * max(reward.image for reward in said) / 2)
    return max(totals) - min(totals)


def response_reward(totals: Iterable[float], config: RewardConfig) -> float:
    """Compute R(y) from the R(s) of its sentences; 0 for a response without any."""
    values = list(totals)
    if not values:
        return 0.0
    if config.response == "sum":
        return sum(values)
    if config.response == "mean":
        return sum(values) / len(values)
    return sum(values) / (len(values) + 1)


def path_ids(node_id: str) -> list[str]:
    """List the ids from a response's first sentence to the node: '2.0' -> ['2', '2.0']."""
    parts = node_id.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _baseline(sentences: Sequence[Node], rewards: Sequence[float], config: RewardConfig) -> float:
    """Return the reward that is worth nothing, each distinct sentence counting once."""
    if config.baseline == "none" or not sentences:
        return 0.0
    by_words = {bag_of_words(node.sentence): reward for node, reward in zip(sentences, rewards, strict=True)}
    distinct = by_words.values()
    return fmean(distinct) if config.baseline == "mean" else (min(distinct) + max(distinct)) / 2


def _z_scores(values: Sequence[float]) -> list[float]:
    spread = pstdev(values) if values else 0.0
    if spread == 0.0:
        return [0.0] * len(values)
    mean = fmean(values)
    return [(value - mean) / spread for value in values]


def _sibling_ranks(nodes: Sequence[Node], scores: Sequence[float]) -> list[float]:
    """Rank within each family, 1/n for the highest score to 1; ties go by node order."""
    families: dict[str, list[int]] = defaultdict(list)
    for index, node in enumerate(nodes):
        families[node.parent_id].append(index)
    ranks = [0.0] * len(nodes)
    for members in families.values():
        ordered = sorted(members, key=lambda index: -scores[index])
        for place, index in enumerate(ordered, start=1):
            ranks[index] = place / len(members)
    return ranks


def _repeats(nodes: Sequence[Node], sentences: Sequence[Node]) -> list[bool]:
    """Tell for each sentence whether an earlier one on its path has the same words."""
    by_id: Mapping[str, Node] = {node.node_id: node for node in nodes}
    return [repeats_earlier(node, by_id) for node in sentences]


def repeats_earlier(node: Node, by_id: Mapping[str, Node]) -> bool:
    """Whether a sentence has, as a multiset, the words of an earlier one on its path."""
    words = bag_of_words(node.sentence)
    return any(words == bag_of_words(by_id[earlier].sentence) for earlier in path_ids(node.node_id)[:-1])


@lru_cache(maxsize=1 << 12)  # A tree's sentences are compared with each other again and again.
def bag_of_words(text: str) -> tuple[str, ...]:
    """Lower-cased words in alphabetical order, repetitions included."""
    return tuple(sorted(_WORD.findall(text.lower())))
