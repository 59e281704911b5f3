"""Preference pairs (section 3.2.2): the responses of highest and lowest reward."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from csr_vlm.config import MethodConfig
from csr_vlm.method.reward import path_ids, response_reward, sentence_rewards
from csr_vlm.records import Fate, Node, Pair, Prompt, Response

_LEAVES = (Fate.FINISHED, Fate.TRUNCATED)


def responses(nodes: Sequence[Node], method: MethodConfig, scorer: str) -> list[Response]:
    """List the whole responses of one prompt's tree, with their rewards."""
    by_id = {node.node_id: node for node in nodes}
    rewards = sentence_rewards(nodes, method, scorer)
    found = []
    for leaf in nodes:
        if leaf.fate not in _LEAVES:
            continue
        path = [by_id[part] for part in path_ids(leaf.node_id)]
        sentences = [node for node in path if node.sentence]
        found.append(
            Response(
                node_id=leaf.node_id,
                token_ids=tuple(token for node in path for token in node.token_ids),
                logprob=sum(node.logprob for node in path),
                text="".join(node.text for node in path).strip(),
                num_sentences=len(sentences),
                reward=response_reward((rewards[node.node_id].total for node in sentences), method.reward),
                complete=leaf.fate is Fate.FINISHED,
            )
        )
    return found


def make_pairs(prompt: Prompt, nodes: Sequence[Node], method: MethodConfig, scorer: str, seed: int) -> list[Pair] | str:
    """Return the prompt's pairs, the widest margin first, or in a word why it has none.

    With ``per_prompt`` above 1 the best response also meets others, spread evenly over the
    ranking: where they leave something out that it says, stopping early is rejected too.

    The reasons: ``incomplete`` (fewer than two responses came to an end), ``identical``
    (all say the same), ``margin`` (the rewards differ by ``min_margin`` or less).
    """
    found = responses(nodes, method, scorer)
    if method.pairs.require_complete:
        found = [response for response in found if response.complete]
    if len(found) < 2:
        return "incomplete"
    # One of several responses with the same text: the choice between them means nothing.
    by_text: dict[str, Response] = {}
    for response in found:
        by_text.setdefault(response.text, response)
    distinct = list(by_text.values())
    if len(distinct) < 2:
        return "identical"
    if method.pairs.selection == "random":
        chosen, *others = _shuffled(distinct, f"{seed}:{nodes[0].iteration}:{prompt.prompt_id}")
    else:
        chosen = max(distinct, key=lambda response: response.reward)
        worst_first = sorted(distinct, key=lambda response: response.reward)
        others = [r for r in worst_first if chosen.reward - r.reward > method.pairs.min_margin]
        if not others:
            return "margin"
    rejected = _spread(others, method.pairs.per_prompt)
    return [Pair(prompt=prompt, iteration=nodes[0].iteration, chosen=chosen, rejected=other) for other in rejected]


def _spread(items: Sequence[Response], number: int) -> list[Response]:
    """Take up to ``number`` items, the first among them and the rest at even distances."""
    number = min(number, len(items))
    return [items[place * len(items) // number] for place in range(number)]


def _shuffled(found: Sequence[Response], key: str) -> list[Response]:
    """Order responses by a keyed hash: random, yet the same on every machine and run."""
    return sorted(found, key=lambda r: hashlib.sha256(f"{key}:{r.node_id}".encode()).digest())
