"""Preference pairs (section 3.2.2): what the policy should rather log, and what not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from csr_vlm.config.schema import MethodConfig, PairsConfig
from csr_vlm.core.batching import evenly_spaced
from csr_vlm.core.records import Finish, Node, NodeStatus, Pair, Prompt, Response
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
    """A response, whole or so far, that could be preferred to others."""

    response: Response
    after: float | None
    """The most that was found to be earned after it; None where nobody looked."""


def responses(nodes: Sequence[Node], method: MethodConfig, scorer: str) -> list[Response]:
    """List the whole responses of one prompt's tree, with their rewards R(y)."""
    by_id = {node.node_id: node for node in nodes}
    rewards = sentence_rewards(nodes, method, scorer)
    found = []
    for leaf in nodes:
        if leaf.status in _LEAVES:
            said = [part for part in path_ids(leaf.node_id) if part in rewards]
            reward = response_reward((rewards[part].total for part in said), method.reward)
            found.append(_response(leaf, by_id, reward))
    return found


def make_pairs(prompt: Prompt, nodes: Sequence[Node], method: MethodConfig, scorer: str, seed: int) -> list[Pair] | str:
    """Return the prompt's pairs, of extremes the widest margin first, or in a word why it has none.

    Between ``responses`` the best whole response meets others, spread over the ranking
    (``per_prompt`` 1: the worst). Between ``siblings`` the best sentence of every partial
    response meets the others that could have stood in its place; the two sides share all
    tokens before it, so that a pair is about one decision and nothing else. A sentence is
    worth its reward and, with ``look_ahead``, the most that the tree earns after it, so
    that passing over something that is never said later costs; two of which one was not
    followed are compared by their own rewards. Ending the response earns 0.

    The reasons: ``incomplete`` (fewer than two came to an end), ``identical`` (all say the
    same), ``margin`` (no rewards differ by more than ``min_margin``).
    """
    config = method.pairs
    rewards = sentence_rewards(nodes, method, scorer)
    if config.between == "siblings":
        contests = _siblings(nodes, rewards, config)
    else:
        found = responses(nodes, method, scorer)
        contests = [[_Option(r, 0.0) for r in found if r.complete or not config.require_complete]]
    contests = [contest for contest in contests if len(contest) > 1]
    if not contests:
        return "incomplete" if config.between == "responses" else "identical"
    distinct = [kept for contest in contests if len(kept := _distinct(contest)) > 1]
    if not distinct:
        return "identical"
    key = f"{seed}:{nodes[0].iteration}:{prompt.prompt_id}"
    least = config.min_margin * reward_scale(rewards.values(), method)
    limit = config.per_node if config.between == "siblings" else config.per_prompt
    ranked = [pair for contest in distinct for pair in evenly_spaced(_ranking(contest, config, key, least), limit)]
    if not ranked:
        return "margin"
    if config.selection == "extremes":  # at random, taking the widest margins first would be a preference
        ranked.sort(key=lambda pair: pair[1].reward - pair[0].reward)
    return [
        Pair(prompt=prompt, iteration=nodes[0].iteration, chosen=chosen, rejected=rejected)
        for chosen, rejected in evenly_spaced(ranked, config.per_prompt)
    ]


def _siblings(nodes: Sequence[Node], rewards: Mapping[str, SentenceReward], config: PairsConfig) -> list[list[_Option]]:
    """Group the partial responses that differ in their last sentence only, each worth that sentence."""
    by_id = {node.node_id: node for node in nodes}
    families: dict[str, list[Node]] = {}
    for node in nodes:
        ended = node.finish is not Finish.LENGTH
        if node.status not in NOT_CANDIDATES and (ended or not config.require_complete):
            families.setdefault(node.parent_id, []).append(node)

    def worth(node: Node) -> float:
        return rewards[node.node_id].total if node.sentence else 0.0

    def after(node: Node) -> float | None:
        if node.status is NodeStatus.FINISHED:
            return 0.0
        children = families.get(node.node_id)
        return max(worth(child) + (after(child) or 0.0) for child in children) if children else None

    return [
        [_Option(_response(node, by_id, worth(node)), after(node) if config.look_ahead else None) for node in family]
        for family in families.values()
    ]


def _response(last: Node, by_id: Mapping[str, Node], reward: float) -> Response:
    path = [by_id[part] for part in path_ids(last.node_id)]
    return Response(
        node_id=last.node_id,
        token_ids=tuple(token for node in path for token in node.token_ids),
        logprob=sum(node.logprob for node in path),
        text="".join(node.text for node in path).strip(),
        num_sentences=sum(bool(node.sentence) for node in path),
        reward=reward,
        complete=last.status is NodeStatus.FINISHED,
    )


def _distinct(contest: Iterable[_Option]) -> list[_Option]:
    """Keep one of several that say the same, if possible one that was followed."""
    by_words: dict[object, _Option] = {}
    for option in contest:
        key = (option.response.text, option.response.complete)
        if key not in by_words or (by_words[key].after is None and option.after is not None):
            by_words[key] = option
    return list(by_words.values())


def _ranking(
    contest: Sequence[_Option], config: PairsConfig, key: str, least: float
) -> list[tuple[Response, Response]]:
    """Choose what is preferred, and pair it with what it is preferred to, the widest margin first."""
    if config.selection == "random":
        chosen, *others = _shuffled([option.response for option in contest], key)
        return [(chosen, other) for other in others]
    followed = [option for option in contest if option.after is not None]
    best = max(followed or contest, key=lambda option: option.response.reward + (option.after or 0.0))
    pairs = [_compared(best, other) for other in contest if other is not best]
    pairs = [pair for pair in pairs if pair[0].reward - pair[1].reward > least]
    return sorted(pairs, key=lambda pair: pair[1].reward - pair[0].reward)


def _compared(best: _Option, other: _Option) -> tuple[Response, Response]:
    """Return the two with what each is worth: with what comes after, where that is known of both."""
    if best.after is None or other.after is None:
        return best.response, other.response
    return (
        replace(best.response, reward=best.response.reward + best.after),
        replace(other.response, reward=other.response.reward + other.after),
    )


def _shuffled(found: Sequence[Response], key: str) -> list[Response]:
    """Order responses by a keyed hash: random, yet the same on every machine and run."""
    return sorted(found, key=lambda r: hashlib.sha256(f"{key}:{r.node_id}".encode()).digest())
