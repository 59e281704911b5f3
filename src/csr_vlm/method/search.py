"""Sentence-level search (section 3.2.1, first half of algorithm 1).

From every live partial response several candidate sentences are proposed and scored; the
best and the worst partial responses go on; a response that ends by itself leaves the
beam. Models appear only as what proposes and what scores, so everything here is pure.

Where the paper is silent: candidates of all live partial responses of a prompt compete
with each other; a finished response is kept whatever its reward, since it costs no more
generation; a sibling with the very tokens of an earlier one is recorded and not expanded.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Protocol

from csr_vlm.config.schema import FilterConfig, MethodConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Candidate, Expansion, Finish, Node, NodeStatus, Prompt
from csr_vlm.method.reward import bag_of_words, path_ids, response_reward, sentence_rewards

Propose = Callable[[Sequence[Expansion]], Sequence[Sequence[Candidate]]]
"""Continue each partial response by one sentence, several times."""


class Proposer(Protocol):
    """Continues partial responses of many prompts, each prompt at its own pace."""

    def submit(self, requests: Sequence[Expansion]) -> None:
        """Take on the next round of some prompts; no other partial response of theirs is asked for again."""
        ...

    def collect(self) -> Sequence[tuple[Expansion, Sequence[Candidate]]]:
        """Wait until some prompts have all their requests answered; give these, in the order of asking."""
        ...

    def release(self, prompt_id: str) -> None:
        """Forget a prompt, all of whose requests are answered."""
        ...


class InRounds:
    """Makes a proposer of a function: everything submitted is answered together."""

    def __init__(self, propose: Propose) -> None:
        self._propose = propose
        self._requests: list[Expansion] = []

    def submit(self, requests: Sequence[Expansion]) -> None:
        self._requests += requests

    def collect(self) -> Sequence[tuple[Expansion, Sequence[Candidate]]]:
        requests, self._requests = self._requests, []
        return list(zip(requests, self._propose(requests), strict=True))

    def release(self, prompt_id: str) -> None:
        pass


Score = Callable[[Sequence[tuple[Prompt, str]]], Sequence[Mapping[str, float]]]
"""Cosines of (prompt's image, sentence), by scorer name."""


@dataclass
class Tree:
    """The growing tree of one prompt."""

    prompt: Prompt
    iteration: int
    nodes: list[Node] = field(default_factory=list)
    frontier: list[str] = field(default_factory=lambda: [""])
    """Ids of the partial responses to expand next; the root at first."""

    def path(self, node_id: str) -> list[Node]:
        """List a partial response's nodes from its first sentence on."""
        by_id = {node.node_id: node for node in self.nodes}
        return [by_id[part] for part in path_ids(node_id)] if node_id else []

    def expansions(self, method: MethodConfig, seed: int) -> list[Expansion]:
        """Say what the engine is to continue."""
        return [
            Expansion(
                prompt=self.prompt,
                node_id=node_id,
                prefix_ids=tuple(token for node in self.path(node_id) for token in node.token_ids),
                num_candidates=method.search.num_candidates,
                seed=(seed, self.prompt.prompt_id, self.iteration, node_id),
            )
            for node_id in self.frontier
        ]

    def grow(
        self,
        candidates: Mapping[str, Sequence[Candidate]],
        cosines: Mapping[str, Mapping[str, float]],
        method: MethodConfig,
        scorer: str,
    ) -> None:
        """Take one round's candidates, by the node they continue, and choose who goes on."""
        fresh = [
            self._node(parent, index, candidate, siblings, cosines, method)
            for parent, siblings in candidates.items()
            for index, candidate in enumerate(siblings)
        ]
        self.nodes += fresh
        undecided = [node for node in fresh if node.status is NodeStatus.PRUNED]
        kept = choose(self.nodes, undecided, method, scorer)
        at_limit = all(node.depth >= method.search.max_sentences for node in undecided)
        if at_limit:
            kept = dict.fromkeys(kept, NodeStatus.TRUNCATED)
        self.nodes = [replace(node, status=kept[node.node_id]) if node.node_id in kept else node for node in self.nodes]
        self.frontier = [] if at_limit else list(kept)

    def _node(
        self,
        parent: str,
        index: int,
        candidate: Candidate,
        siblings: Sequence[Candidate],
        cosines: Mapping[str, Mapping[str, float]],
        method: MethodConfig,
    ) -> Node:
        earlier = self.path(parent)
        if not all(map(isfinite, candidate.token_logprobs)):
            raise CsrError(
                f"prompt {self.prompt.prompt_id}: the policy gives a token the log-probability "
                f"{next(lp for lp in candidate.token_logprobs if not isfinite(lp))}",
                f"look at {self.prompt.image} and at the weights; float16 overflows where bfloat16 and float32 do not",
            )
        if candidate.token_ids in [sibling.token_ids for sibling in siblings[:index]]:
            status = NodeStatus.DUPLICATE
        elif not candidate.sentence:
            # Nothing but an end: of the response so far, if there is one.
            status = NodeStatus.FINISHED if candidate.finish is Finish.EOS and earlier else NodeStatus.FILTERED
        elif refused(candidate.sentence, [node.sentence for node in earlier], method.search.filters):
            status = NodeStatus.FILTERED
        elif candidate.finish is Finish.EOS:
            status = NodeStatus.FINISHED
        elif candidate.finish is Finish.LENGTH or self._too_long(earlier, candidate, method):
            status = NodeStatus.TRUNCATED
        else:
            status = NodeStatus.PRUNED
        return Node(
            prompt_id=self.prompt.prompt_id,
            iteration=self.iteration,
            node_id=f"{parent}.{index}" if parent else str(index),
            parent_id=parent,
            depth=len(earlier) + 1,
            token_ids=candidate.token_ids,
            token_logprobs=candidate.token_logprobs,
            text=candidate.text,
            finish=candidate.finish,
            status=status,
            cosines=dict(cosines.get(candidate.sentence, {})),
        )

    @staticmethod
    def _too_long(earlier: Sequence[Node], candidate: Candidate, method: MethodConfig) -> bool:
        limit = method.search.max_response_chars
        return limit is not None and sum(len(node.text) for node in earlier) + len(candidate.text) > limit


def search(
    prompts: Sequence[Prompt],
    proposer: Proposer | Propose,
    score: Score,
    method: MethodConfig,
    *,
    iteration: int,
    seed: int,
    scorer: str,
) -> list[Tree]:
    """Grow the trees of some prompts, one sentence a round, until all have ended.

    A tree goes on as soon as its own round is answered. It depends on its prompt, the
    iteration and the seed, not on its company. A plain function is asked :class:`InRounds`.
    """
    if callable(proposer):
        proposer = InRounds(proposer)
    trees = {prompt.prompt_id: Tree(prompt, iteration) for prompt in prompts}
    live = set(trees)
    proposer.submit([request for tree in trees.values() for request in tree.expansions(method, seed)])
    while live:
        candidates: dict[str, dict[str, Sequence[Candidate]]] = defaultdict(dict)
        for request, siblings in proposer.collect():
            candidates[request.prompt.prompt_id][request.node_id] = siblings
        grown = [trees[prompt_id] for prompt_id in candidates]
        cosines = _score_once(grown, candidates, score)
        for tree in grown:
            prompt_id = tree.prompt.prompt_id
            tree.grow(candidates[prompt_id], cosines[prompt_id], method, scorer)
            if not tree.frontier:
                proposer.release(prompt_id)
                live.remove(prompt_id)
        proposer.submit([request for tree in grown for request in tree.expansions(method, seed)])
    return list(trees.values())


def _score_once(
    trees: Sequence[Tree], candidates: Mapping[str, Mapping[str, Sequence[Candidate]]], score: Score
) -> dict[str, dict[str, Mapping[str, float]]]:
    """Score each distinct sentence of each prompt once: prompt id -> sentence -> cosines."""
    wanted: dict[str, dict[str, Mapping[str, float]]] = {}
    for tree in trees:
        siblings = candidates[tree.prompt.prompt_id].values()
        wanted[tree.prompt.prompt_id] = {c.sentence: {} for family in siblings for c in family if c.sentence}
    items = [(tree.prompt, sentence) for tree in trees for sentence in wanted[tree.prompt.prompt_id]]
    for (prompt, sentence), cosines in zip(items, score(items), strict=True):
        wanted[prompt.prompt_id][sentence] = cosines
    return wanted


def choose(
    nodes: Sequence[Node], candidates: Sequence[Node], method: MethodConfig, scorer: str
) -> dict[str, NodeStatus]:
    """Pick the top-k and the bottom-k partial responses; ties go to the earlier node.

    Args:
        nodes: All of the prompt's nodes so far, the candidates among them.
        candidates: Nodes of this round that may be expanded.

    Returns:
        The status of those kept, best first, then worst first.
    """
    merit = steering_scores(nodes, candidates, method, scorer)
    best_first = sorted(candidates, key=lambda node: -merit[node.node_id])
    top = best_first[: method.search.keep_top]
    rest = best_first[method.search.keep_top :]
    worst_first = sorted(rest, key=lambda node: merit[node.node_id])
    bottom = worst_first[: method.search.keep_bottom]
    return {node.node_id: NodeStatus.TOP for node in top} | {node.node_id: NodeStatus.BOTTOM for node in bottom}


def steering_scores(
    nodes: Sequence[Node], candidates: Sequence[Node], method: MethodConfig, scorer: str
) -> dict[str, float]:
    """Compute what ranks the partial responses that end in the candidates."""
    by_id = {node.node_id: node for node in nodes}
    paths = {node.node_id: [by_id[part] for part in path_ids(node.node_id)] for node in candidates}
    if method.search.steer_by == "logprob":
        return {
            node_id: sum(node.logprob for node in path) / sum(len(node.token_ids) for node in path)
            for node_id, path in paths.items()
        }
    rewards = sentence_rewards(nodes, method, scorer)
    if method.search.steer_by == "sentence":
        return {node_id: rewards[node_id].total for node_id in paths}
    return {
        node_id: response_reward((rewards[node.node_id].total for node in path if node.sentence), method.reward)
        for node_id, path in paths.items()
    }


def refused(text: str, earlier: Sequence[str], filters: FilterConfig) -> bool:
    """Whether a candidate filter refuses the sentence."""
    if len(text) < filters.min_chars:
        return True
    if filters.max_newlines is not None and text.count("\n") > filters.max_newlines:
        return True
    if filters.repeats and bag_of_words(text) in [bag_of_words(before) for before in earlier]:
        return True
    return filters.non_latin and any(
        char.isalpha() and not unicodedata.name(char, "LATIN").startswith("LATIN") for char in text
    )
