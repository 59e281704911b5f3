"""Derive preference pairs from a prompt's tree (section 3.2.2).

The paper prefers the response with the highest R(y) to the one with the lowest. Between
``siblings``, a pair instead compares two sentences that continue the same partial response.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from csr_vlm.config.schema import MethodConfig
from csr_vlm.core.batching import evenly_spaced
from csr_vlm.core.records import Finish, Node, NodeStatus, Pair, Prompt, Response
from csr_vlm.method.claim_evidence import Evidence, thing_of
from csr_vlm.method.reward import (
    NOT_CANDIDATES,
    SentenceReward,
    path_ids,
    response_reward,
    reward_scale,
    sentence_rewards,
)

_LEAVES = (NodeStatus.FINISHED, NodeStatus.TRUNCATED)


@dataclass(frozen=True)
class _Option:
    """Hold a complete or partial response that can be preferred to others."""

    response: Response
    future_reward: float | None
    """Highest reward that the tree reaches after it; None if it was not expanded, or is not looked ahead of."""
    repeats: bool = False
    """Whether its last sentence repeats an earlier one."""
    lowest: float = 0.0
    """Evidence for the most doubtful claim that its last sentence adds; 0 for ending."""
    ends: bool = False
    """Whether it only ends the response, without a sentence."""
    says_all: bool = False
    """Whether its partial response names everything in the tree that has evidence."""

    @property
    def value(self) -> float:
        """Return the reward including the future reward, as far as it is known."""
        return self.response.reward + (self.future_reward or 0.0)


def responses(nodes: Sequence[Node], method: MethodConfig, scorer: str) -> list[Response]:
    """Return the complete and truncated responses of one prompt's tree, with their rewards R(y).

    Raises:
        CsrError: A cosine is missing or not finite.
    """
    by_id = {node.node_id: node for node in nodes}
    rewards = sentence_rewards(nodes, method, scorer)
    leaves = [node for node in nodes if node.status in _LEAVES]
    return [_response(leaf, by_id, _response_reward_of(leaf, rewards, method)) for leaf in leaves]


def _response_reward_of(leaf: Node, rewards: Mapping[str, SentenceReward], method: MethodConfig) -> float:
    sentence_ids = [node_id for node_id in path_ids(leaf.node_id) if node_id in rewards]
    return response_reward((rewards[node_id].total for node_id in sentence_ids), method.reward)


def make_pairs(prompt: Prompt, nodes: Sequence[Node], method: MethodConfig, scorer: str, seed: int) -> list[Pair] | str:
    """Return the prompt's pairs, or the reason why it has none.

    Between ``responses``, the response with the highest R(y) is preferred to others, spread
    evenly over the ranking; with ``per_prompt`` 1 only to the one with the lowest.

    Between ``siblings``, the best continuation of every partial response is preferred to its
    siblings. Both sides share all tokens before it, so a pair is about one decision. The value
    of a sentence s is R(s) and, with ``look_ahead``, the highest reward that the tree reaches
    after it:

        V(s) = R(s) + max over children c of V(c)

    so that omitting something that is never said later has a cost. Two siblings of which one
    was not expanded are compared by R(s) alone. Ending the response is worth 0.

    With ``reward.unit: claim``, a sentence is as good as its most doubtful claim: the margin is the
    difference in the evidence for these claims, and ending, or claiming nothing, counts 0. No sentence
    of the partial response may be judged false (R_I < 0), no claim of the chosen side may have
    evidence against it, and what repeats an earlier sentence is never chosen. Rejected are only:

    - a sentence with a claim that is judged false (``false_below``), or that repeats, by the margin
    - ending, if the best sentence is judged true (``true_above``)
    - a sentence that repeats, if ending is best and the partial response names all that has evidence

    Pairs are sorted by decreasing margin if ``selection`` is ``extremes``.

    Args:
        prompt: The prompt.
        nodes: Its tree.
        method: Settings of reward and pairs.
        scorer: Columns that the reward uses.
        seed: Random seed of ``selection: random``.

    Returns:
        The pairs, or ``incomplete`` (fewer than two responses ended), ``identical`` (all of
        them have the same text), ``no_evidence`` (the scorer says nothing about any claim), ``margin`` (no
        margin exceeds ``min_margin``) or ``failed`` (the prompt failed in the search, and its tree is
        empty).

    Raises:
        CsrError: A cosine is missing or not finite.
    """
    if not nodes:
        return "failed"
    config = method.pairs
    rewards = sentence_rewards(nodes, method, scorer)
    if config.between == "siblings":
        groups, limit = _sibling_options(nodes, rewards, method, scorer), config.per_node
    else:
        groups, limit = [_response_options(nodes, method, scorer)], config.per_prompt
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        return "incomplete" if config.between == "responses" else "identical"
    groups = [distinct for group in groups if len(distinct := _without_duplicates(group)) > 1]
    if not groups:
        return "identical"
    key = f"{seed}:{nodes[0].iteration}:{prompt.prompt_id}"
    min_margin = config.min_margin * reward_scale(rewards.values(), method)
    preferences = [
        preference
        for group in groups
        for preference in evenly_spaced(_preferences(group, method, key, min_margin), limit)
    ]
    if not preferences:
        is_silent = method.reward.unit == "claim" and not any(reward.image for reward in rewards.values())
        return "no_evidence" if is_silent else "margin"
    if config.selection == "extremes":  # at random, sorting by margin would introduce a preference
        preferences.sort(key=_negative_margin)
    by_id = {node.node_id: node for node in nodes}
    return [
        Pair(prompt, nodes[0].iteration, chosen, rejected, *_shared(chosen, rejected, by_id))
        for chosen, rejected in evenly_spaced(preferences, config.per_prompt)
    ]


def _shared(chosen: Response, rejected: Response, by_id: Mapping[str, Node]) -> tuple[int, float]:
    """Return the number of tokens that both responses begin with, and the log-probability of these.

    At least one token of each response is left.
    """
    both = list(zip(chosen.token_ids, rejected.token_ids, strict=False))
    number = next((at for at, (left, right) in enumerate(both) if left != right), len(both))
    number = min(number, len(chosen.token_ids) - 1, len(rejected.token_ids) - 1)
    logprobs = [value for node_id in path_ids(chosen.node_id) for value in by_id[node_id].token_logprobs]
    return number, sum(logprobs[:number])


def _response_options(nodes: Sequence[Node], method: MethodConfig, scorer: str) -> list[_Option]:
    """Return the responses of the tree as options; nothing follows them."""
    return [
        _Option(response, 0.0)
        for response in responses(nodes, method, scorer)
        if response.complete or not method.pairs.require_complete
    ]


def _sibling_options(
    nodes: Sequence[Node], rewards: Mapping[str, SentenceReward], method: MethodConfig, scorer: str
) -> list[list[_Option]]:
    """Return a group of options for each partial response: its continuations, each with the reward of its sentence.

    With ``reward.unit: claim``, partial responses that contain a sentence judged false are left out.
    """
    config = method.pairs
    by_id = {node.node_id: node for node in nodes}
    children: dict[str, list[Node]] = {}
    for node in nodes:
        is_whole = node.finish is not Finish.LENGTH
        if node.status not in NOT_CANDIDATES and (is_whole or not config.require_complete):
            children.setdefault(node.parent_id, []).append(node)

    def is_clean(parent_id: str) -> bool:
        return method.reward.unit == "sentence" or all(
            rewards[node_id].image >= 0 for node_id in path_ids(parent_id) if node_id in rewards
        )

    seen = _things_with_evidence(nodes, method, scorer)

    def says_all(parent_id: str) -> bool:
        path = path_ids(parent_id) if parent_id else []
        return bool(seen) and seen <= {thing_of(claim) for node_id in path for claim in by_id[node_id].claims}

    def repeats(node: Node) -> bool:
        return bool(node.sentence) and rewards[node.node_id].repeated

    def lowest(node: Node) -> float:
        return rewards[node.node_id].lowest if node.sentence else 0.0

    def reward(node: Node) -> float:
        return rewards[node.node_id].total if node.sentence else 0.0

    def future_reward(node: Node) -> float | None:
        if node.status is NodeStatus.FINISHED:
            return 0.0
        if node.node_id not in children:
            return None
        return max(reward(child) + (future_reward(child) or 0.0) for child in children[node.node_id])

    return [
        [
            _Option(
                _response(node, by_id, reward(node)),
                future_reward(node) if config.look_ahead else None,
                repeats(node),
                lowest(node),
                ends=not node.sentence,
                says_all=says_all(parent_id),
            )
            for node in siblings
        ]
        for parent_id, siblings in children.items()
        if is_clean(parent_id)
    ]


def _things_with_evidence(nodes: Sequence[Node], method: MethodConfig, scorer: str) -> set[str]:
    if not method.compares_claims:
        return set()
    nats = Evidence.of(nodes, method.reward, scorer).nats
    return {claim for claim in nats if claim == thing_of(claim) and nats[claim] > 0}


def _response(last: Node, by_id: Mapping[str, Node], reward: float) -> Response:
    """Return the response that ends in a node."""
    path = [by_id[node_id] for node_id in path_ids(last.node_id)]
    return Response(
        node_id=last.node_id,
        token_ids=tuple(token for node in path for token in node.token_ids),
        logprob=sum(node.logprob for node in path),
        text="".join(node.text for node in path).strip(),
        num_sentences=sum(bool(node.sentence) for node in path),
        reward=reward,
        complete=last.status is NodeStatus.FINISHED,
    )


def _without_duplicates(options: Iterable[_Option]) -> list[_Option]:
    """Keep one of the options with the same text: the first one that was expanded, else the first one."""
    by_text: dict[tuple[str, bool], _Option] = {}
    for option in options:
        key = (option.response.text, option.response.complete)
        if key not in by_text or (by_text[key].future_reward is None and option.future_reward is not None):
            by_text[key] = option
    return list(by_text.values())


def _preferences(
    options: Sequence[_Option], method: MethodConfig, key: str, min_margin: float
) -> list[tuple[Response, Response]]:
    """Return (chosen, rejected) for one group: the best option against the others, by decreasing margin.

    With ``selection: random``, one option against the others, in random order.
    """
    if method.pairs.selection == "random":
        chosen, *rejected = _shuffled([option.response for option in options], key)
        return [(chosen, other) for other in rejected]
    if method.compares_claims:
        return _claim_preferences(options, method, min_margin)
    expanded = [option for option in options if option.future_reward is not None]
    best = max(expanded or options, key=lambda option: option.value)
    preferences = [_with_values(best, other) for other in options if other is not best]
    preferences = [(chosen, other) for chosen, other in preferences if chosen.reward - other.reward > min_margin]
    return sorted(preferences, key=_negative_margin)


def _claim_preferences(
    options: Sequence[_Option], method: MethodConfig, min_margin: float
) -> list[tuple[Response, Response]]:
    """Return (chosen, rejected) for one group whose sentences are as good as their most doubtful claims.

    A sum would let a certain claim carry a doubtful one, and prefer sentences that claim more.
    """
    config = method.pairs
    new = [option for option in options if not option.repeats]
    best = max(new, key=lambda option: (option.lowest, option.value), default=None)
    if best is None or best.lowest < 0:
        return []

    def is_worse(other: _Option) -> bool:
        if other.ends:
            return best.lowest >= config.true_above
        if other.repeats and best.ends and best.says_all:
            return True
        exceeds = method.lambda_ * (best.lowest - other.lowest) > min_margin
        return exceeds and (other.repeats or other.lowest <= config.false_below)

    rejected = [other for other in options if is_worse(other)]
    return [_with_values(best, other) for other in sorted(rejected, key=lambda other: other.lowest)]


def _with_values(best: _Option, other: _Option) -> tuple[Response, Response]:
    """Return both responses with their values as rewards, or with R(s) if one future reward is unknown."""
    if best.future_reward is None or other.future_reward is None:
        return best.response, other.response
    return replace(best.response, reward=best.value), replace(other.response, reward=other.value)


def _negative_margin(preference: tuple[Response, Response]) -> float:
    chosen, rejected = preference
    return rejected.reward - chosen.reward


def _shuffled(unordered: Sequence[Response], key: str) -> list[Response]:
    """Order responses by a keyed hash: random, but the same on every machine and in every run."""
    return sorted(unordered, key=lambda r: hashlib.sha256(f"{key}:{r.node_id}".encode()).digest())
