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


def make_pair(prompt: Prompt, nodes: Sequence[Node], method: MethodConfig, scorer: str, seed: int) -> Pair | str:
    """Return the prompt's pair, or in a word why it has none.

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
        chosen, rejected = _two_at_random(distinct, f"{seed}:{nodes[0].iteration}:{prompt.prompt_id}")
    else:
        chosen = max(distinct, key=lambda response: response.reward)
        rejected = min(distinct, key=lambda response: response.reward)
        if chosen.reward - rejected.reward <= method.pairs.min_margin:
            return "margin"
    return Pair(prompt=prompt, iteration=nodes[0].iteration, chosen=chosen, rejected=rejected)


def _two_at_random(found: Sequence[Response], key: str) -> tuple[Response, Response]:
    """Order responses by a keyed hash: random, yet the same on every machine and run."""
    shuffled = sorted(found, key=lambda r: hashlib.sha256(f"{key}:{r.node_id}".encode()).digest())
    return shuffled[0], shuffled[1]
