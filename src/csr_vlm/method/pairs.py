"""Preference pairs (section 3.2.2): what the policy should rather say, and what not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from csr_vlm.config import MethodConfig, PairsConfig
from csr_vlm.method.reward import (
    OUT_OF_THE_RUNNING,
    SentenceReward,
    path_ids,
    response_reward,
    reward_scale,
    sentence_rewards,
)
from csr_vlm.records import Fate, Finish, Node, Pair, Prompt, Response

_Item = TypeVar("_Item")
_LEAVES = (Fate.FINISHED, Fate.TRUNCATED)
Ranking = tuple[Response, Sequence[Response]]
"""What is preferred, and what it is preferred to, the widest margin first."""


def responses(nodes: Sequence[Node], method: MethodConfig, scorer: str) -> list[Response]:
    """List the whole responses of one prompt's tree, with their rewards R(y)."""
    by_id = {node.node_id: node for node in nodes}
    rewards = sentence_rewards(nodes, method, scorer)
    found = []
    for leaf in nodes:
        if leaf.fate in _LEAVES:
            said = [part for part in path_ids(leaf.node_id) if part in rewards]
            reward = response_reward((rewards[part].total for part in said), method.reward)
            found.append(_response(leaf, by_id, reward))
    return found


def make_pairs(prompt: Prompt, nodes: Sequence[Node], method: MethodConfig, scorer: str, seed: int) -> list[Pair] | str:
    """Return the prompt's pairs, of extremes the widest margin first, or in a word why it has none.

    Between ``responses`` the best whole response meets others, spread over the ranking
    (``per_prompt`` 1: the worst). Between ``siblings`` the best sentence of every partial
    response meets the others that could have stood in its place; the two sides share all
    tokens before it, so that a pair is about one decision and nothing else. Ending the
    response is such a decision, and earns 0.

    The reasons: ``incomplete`` (fewer than two came to an end), ``identical`` (all say the
    same), ``margin`` (no rewards differ by more than ``min_margin``).
    """
    config = method.pairs
    rewards = sentence_rewards(nodes, method, scorer)
    if config.between == "siblings":
        contests = _siblings(nodes, rewards, config)
    else:
        contests = [[r for r in responses(nodes, method, scorer) if r.complete or not config.require_complete]]
    contests = [contest for contest in contests if len(contest) > 1]
    if not contests:
        return "incomplete" if config.between == "responses" else "identical"
    distinct = [kept for contest in contests if len(kept := _distinct(contest)) > 1]
    if not distinct:
        return "identical"
    key = f"{seed}:{nodes[0].iteration}:{prompt.prompt_id}"
    least = config.min_margin * reward_scale(rewards.values(), method)
    ranked = [_ranking(contest, config, key, least) for contest in distinct]
    limit = config.per_node if config.between == "siblings" else config.per_prompt
    found = [(chosen, rejected) for chosen, others in ranked for rejected in _spread(others, limit)]
    if not found:
        return "margin"
    if config.selection == "extremes":  # at random, taking the widest margins first would be a preference
        found.sort(key=lambda pair: pair[1].reward - pair[0].reward)
    return [
        Pair(prompt=prompt, iteration=nodes[0].iteration, chosen=chosen, rejected=rejected)
        for chosen, rejected in _spread(found, config.per_prompt)
    ]


def _siblings(
    nodes: Sequence[Node], rewards: Mapping[str, SentenceReward], config: PairsConfig
) -> list[list[Response]]:
    """Group the partial responses that differ in their last sentence only, each worth that sentence."""
    by_id = {node.node_id: node for node in nodes}
    families: dict[str, list[Response]] = {}
    for node in nodes:
        ended = node.finish is not Finish.LENGTH
        if node.fate not in OUT_OF_THE_RUNNING and (ended or not config.require_complete):
            reward = rewards[node.node_id].total if node.sentence else 0.0
            families.setdefault(node.parent_id, []).append(_response(node, by_id, reward))
    return list(families.values())


def _response(last: Node, by_id: Mapping[str, Node], reward: float) -> Response:
    path = [by_id[part] for part in path_ids(last.node_id)]
    return Response(
        node_id=last.node_id,
        token_ids=tuple(token for node in path for token in node.token_ids),
        logprob=sum(node.logprob for node in path),
        text="".join(node.text for node in path).strip(),
        num_sentences=sum(bool(node.sentence) for node in path),
        reward=reward,
        complete=last.fate is Fate.FINISHED,
    )


def _distinct(contest: Iterable[Response]) -> list[Response]:
    """Keep one of several that say the same: the choice between them means nothing."""
    by_words: dict[object, Response] = {}
    for response in contest:
        by_words.setdefault((response.text, response.complete), response)
    return list(by_words.values())


def _ranking(contest: Sequence[Response], config: PairsConfig, key: str, least: float) -> Ranking:
    """Choose what is preferred, and list what it is preferred to."""
    if config.selection == "random":
        chosen, *others = _shuffled(contest, key)
        return chosen, others
    chosen = max(contest, key=lambda response: response.reward)
    worst_first = sorted(contest, key=lambda response: response.reward)
    return chosen, [other for other in worst_first if chosen.reward - other.reward > least]


def _spread(items: Sequence[_Item], number: int) -> list[_Item]:
    """Take up to ``number`` items, the first among them and the rest at even distances."""
    number = min(number, len(items))
    return [items[place * len(items) // number] for place in range(number)]


def _shuffled(found: Sequence[Response], key: str) -> list[Response]:
    """Order responses by a keyed hash: random, yet the same on every machine and run."""
    return sorted(found, key=lambda r: hashlib.sha256(f"{key}:{r.node_id}".encode()).digest())
