"""Search sentence by sentence (section 3.2.1, first half of algorithm 1).

From every live partial response of a prompt, several candidate sentences are proposed and
scored. The best and the worst partial responses (top-k and bottom-k) are expanded in the next
round, until every response has ended. Models appear only as a proposer and a scoring function,
so everything here is pure.

Where the paper leaves it open:

- The candidates of all live partial responses of a prompt compete with each other.
- A finished response is kept whatever its reward, since it needs no more generation.
- A sibling with the same tokens as an earlier one is recorded but not expanded.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from types import MappingProxyType
from typing import Protocol, TypeVar

from csr_vlm.config.schema import FilterConfig, MethodConfig, SearchConfig
from csr_vlm.core.errors import PromptError
from csr_vlm.core.records import Candidate, Expansion, Finish, Node, NodeStatus, Prompt
from csr_vlm.method.reward import path_ids, response_reward, sentence_rewards

Propose = Callable[[Sequence[Expansion]], Sequence[Sequence[Candidate]]]
"""Continues each partial response by one sentence, several times."""
Score = Callable[[Sequence[tuple[Prompt, str]]], Sequence[Mapping[str, float]]]
"""Returns the cosines of (prompt's image, sentence), by ledger column."""
Claims = Mapping[str, Mapping[str, float]]
"""Claims of a sentence, each with its own cosines by ledger column."""
ScoreClaims = Callable[[Sequence[tuple[Prompt, str]]], Sequence[Claims]]
"""Returns the claims of (prompt's image, sentence)."""


_Scores = TypeVar("_Scores")
NO_CLAIMS: Mapping[str, Claims] = MappingProxyType({})


class Proposer(Protocol):
    """Continue partial responses of many prompts, each prompt at its own pace."""

    def submit(self, requests: Sequence[Expansion]) -> None:
        """Accept the next round of some prompts; none of their earlier partial responses follows later."""
        ...

    def collect(self) -> Sequence[tuple[Expansion, Sequence[Candidate]]]:
        """Wait for prompts whose requests are all answered; return these in the order of submission."""
        ...

    def release(self, prompt_id: str) -> None:
        """Free what is held for a prompt whose requests are all answered."""
        ...

    def wants_prompts(self) -> bool:
        """Return whether prompts submitted now would begin before others end."""
        ...


class RoundProposer:
    """Turn a function into a proposer that answers everything submitted so far at once."""

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

    def wants_prompts(self) -> bool:
        """Return False: rounds answer everything together, whoever asks."""
        return False


@dataclass
class Tree:
    """Hold the growing tree of one prompt."""

    prompt: Prompt
    iteration: int
    nodes: list[Node] = field(default_factory=list)
    frontier: list[str] = field(default_factory=lambda: [""])
    """Ids of the partial responses to expand next; first the root, whose id is empty."""

    def path(self, node_id: str) -> list[Node]:
        """Return the nodes of a partial response, from its first sentence on."""
        by_id = {node.node_id: node for node in self.nodes}
        return [by_id[ancestor] for ancestor in path_ids(node_id)] if node_id else []

    def expansions(self, method: MethodConfig, seed: int) -> list[Expansion]:
        """Return the requests of the next round."""
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
        claims: Mapping[str, Claims] = NO_CLAIMS,
    ) -> None:
        """Add the candidates of one round and select the next frontier.

        Args:
            candidates: Candidate sentences, by the id of the node they continue.
            cosines: Cosines by ledger column, by sentence.
            method: Settings of search and reward.
            scorer: Columns that the reward uses.
            claims: Claims by sentence.

        Raises:
            CsrError: A log-probability or a cosine is not finite, or a cosine is missing.
        """
        new_nodes = [
            replace(
                self._node(parent_id, index, siblings, cosines, method.search),
                claims=claims.get(siblings[index].sentence, {}),
            )
            for parent_id, siblings in candidates.items()
            for index in range(len(siblings))
        ]
        self.nodes += new_nodes
        expandable = [node for node in new_nodes if node.status is NodeStatus.PRUNED]
        kept = select_beam(self.nodes, expandable, method, scorer)
        at_limit = all(node.depth >= method.search.max_sentences for node in expandable)
        if at_limit:
            kept = dict.fromkeys(kept, NodeStatus.TRUNCATED)
        self.nodes = [replace(node, status=kept[node.node_id]) if node.node_id in kept else node for node in self.nodes]
        self.frontier = [] if at_limit else list(kept)

    def _node(
        self,
        parent_id: str,
        index: int,
        siblings: Sequence[Candidate],
        cosines: Mapping[str, Mapping[str, float]],
        config: SearchConfig,
    ) -> Node:
        candidate, context = siblings[index], self.path(parent_id)
        self._check_logprobs(candidate)
        return Node(
            prompt_id=self.prompt.prompt_id,
            iteration=self.iteration,
            node_id=f"{parent_id}.{index}" if parent_id else str(index),
            parent_id=parent_id,
            depth=len(context) + 1,
            token_ids=candidate.token_ids,
            token_logprobs=candidate.token_logprobs,
            text=candidate.text,
            finish=candidate.finish,
            status=initial_status(candidate, siblings[:index], context, config),
            cosines=dict(cosines.get(candidate.sentence, {})),
        )

    def _check_logprobs(self, candidate: Candidate) -> None:
        invalid = [logprob for logprob in candidate.token_logprobs if not isfinite(logprob)]
        if invalid:
            raise PromptError(
                f"prompt {self.prompt.prompt_id}: the policy gives a token the log-probability {invalid[0]}",
                f"check {self.prompt.image} and the weights; float16 overflows where bfloat16 and float32 do not",
            )


def initial_status(
    candidate: Candidate, earlier_siblings: Sequence[Candidate], context: Sequence[Node], config: SearchConfig
) -> NodeStatus:
    """Return the status of a candidate before the beam is selected; ``PRUNED`` if it can be expanded.

    Args:
        candidate: A candidate sentence.
        earlier_siblings: The candidates before it that continue the same partial response.
        context: The nodes of that partial response.
        config: Limits and filters.
    """
    if candidate.token_ids in [sibling.token_ids for sibling in earlier_siblings]:
        return NodeStatus.DUPLICATE
    if not candidate.sentence:  # it only ends the response, if there is one
        return NodeStatus.FINISHED if candidate.finish is Finish.EOS and context else NodeStatus.FILTERED
    if is_filtered(candidate.sentence, config.filters):
        return NodeStatus.FILTERED
    if candidate.finish is Finish.EOS:
        return NodeStatus.FINISHED
    is_cut = candidate.finish is Finish.LENGTH and not config.continue_cut
    if is_cut or _exceeds_char_limit(candidate, context, config):
        return NodeStatus.TRUNCATED
    return NodeStatus.PRUNED


def is_filtered(sentence: str, filters: FilterConfig) -> bool:
    """Return whether a candidate filter rejects a sentence.

    Args:
        sentence: A candidate sentence, without surrounding white space.
        filters: Which filters apply.
    """
    if len(sentence) < filters.min_chars:
        return True
    if filters.max_newlines is not None and sentence.count("\n") > filters.max_newlines:
        return True
    return bool((filters.loops and _LOOP.search(sentence)) or (filters.other_scripts and _SCRIPT.search(sentence)))


_LOOP = re.compile(r"\b(\w+)(?:\s+\1){5}|(\S)(?:\s*\2){10}")
"""A word that occurs 6 times in a row, or a character 11 times."""
_SCRIPT = re.compile(
    "[\u3130-\u318f\uac00-\ud7af\u3040-\u30ff\u0400-\u04ff\U0001f300-\U0001f64f\U0001f680-\U0001f77f]|(?:&nbsp;){2}"
)
"""Hangul, kana, Cyrillic letters, emoji, and repeated non-breaking spaces: what the released code drops."""


def _exceeds_char_limit(candidate: Candidate, context: Sequence[Node], config: SearchConfig) -> bool:
    num_chars = sum(len(node.text) for node in context) + len(candidate.text)
    return config.max_response_chars is not None and num_chars > config.max_response_chars


class Search:
    """Grow trees, one sentence a round, until all their responses have ended; prompts may be added at any time.

    A tree enters its next round as soon as its own requests are answered. It depends only on
    its prompt, the iteration, the seed and the settings, not on the other prompts.

    Args:
        proposer: Proposes candidate sentences.
        score: Scores sentences against images.
        method: Settings of search and reward.
        iteration: Stored with every node, and part of the seed.
        seed: Random seed of the run.
        scorer: Columns that the reward uses.
        score_claims: Finds and scores the claims of sentences; by default none are looked for.
    """

    def __init__(
        self,
        proposer: Proposer,
        score: Score,
        method: MethodConfig,
        *,
        iteration: int,
        seed: int,
        scorer: str,
        score_claims: ScoreClaims | None = None,
    ) -> None:
        self._proposer = proposer
        self._score = score
        self._score_claims = score_claims
        self._method = method
        self._iteration = iteration
        self._seed = seed
        self._scorer = scorer
        self._live: dict[str, Tree] = {}

    @property
    def is_idle(self) -> bool:
        """Return whether no tree is growing."""
        return not self._live

    def add(self, prompts: Sequence[Prompt]) -> None:
        """Begin the trees of prompts."""
        trees = {prompt.prompt_id: Tree(prompt, self._iteration) for prompt in prompts}
        self._live |= trees
        self._submit(trees.values())

    def step(self) -> list[Tree]:
        """Wait for answers and grow the answered trees by a round; return those that have ended.

        Raises:
            CsrError: A log-probability or a cosine is not finite, or a cosine is missing.
        """
        candidates: dict[str, dict[str, Sequence[Candidate]]] = defaultdict(dict)
        for request, siblings in self._proposer.collect():
            candidates[request.prompt.prompt_id][request.node_id] = siblings
        answered = [self._live[prompt_id] for prompt_id in candidates]
        cosines = _score_distinct(answered, candidates, self._score)
        claims = _score_distinct(answered, candidates, self._score_claims) if self._score_claims else {}
        ended = []
        for tree in answered:
            prompt_id = tree.prompt.prompt_id
            found = claims.get(prompt_id, NO_CLAIMS)
            tree.grow(candidates[prompt_id], cosines[prompt_id], self._method, self._scorer, found)
            if not tree.frontier:
                self._proposer.release(prompt_id)
                ended.append(self._live.pop(prompt_id))
        self._submit(answered)
        return ended

    def _submit(self, trees: Iterable[Tree]) -> None:
        self._proposer.submit([request for tree in trees for request in tree.expansions(self._method, self._seed)])


def search(
    prompts: Sequence[Prompt],
    proposer: Proposer | Propose,
    score: Score,
    method: MethodConfig,
    *,
    iteration: int,
    seed: int,
    scorer: str,
    score_claims: ScoreClaims | None = None,
) -> list[Tree]:
    """Grow a tree for each prompt; see :class:`Search`.

    Args:
        prompts: Prompts to respond to.
        proposer: Proposes candidate sentences; a plain function is wrapped in :class:`RoundProposer`.
        score: Scores sentences against images.
        method: Settings of search and reward.
        iteration: Stored with every node, and part of the seed.
        seed: Random seed of the run.
        scorer: Columns that the reward uses.
        score_claims: Finds and scores the claims of sentences; by default none are looked for.

    Returns:
        The trees, in the order of the prompts.

    Raises:
        CsrError: A log-probability or a cosine is not finite, or a cosine is missing.
    """
    growing = Search(
        RoundProposer(proposer) if callable(proposer) else proposer,
        score,
        method,
        iteration=iteration,
        seed=seed,
        scorer=scorer,
        score_claims=score_claims,
    )
    growing.add(prompts)
    ended: dict[str, Tree] = {}
    while not growing.is_idle:
        ended |= {tree.prompt.prompt_id: tree for tree in growing.step()}
    return [ended[prompt_id] for prompt_id in dict.fromkeys(prompt.prompt_id for prompt in prompts)]


def _score_distinct(
    trees: Sequence[Tree],
    candidates: Mapping[str, Mapping[str, Sequence[Candidate]]],
    score: Callable[[Sequence[tuple[Prompt, str]]], Sequence[_Scores]],
) -> dict[str, dict[str, _Scores]]:
    """Score each distinct sentence of each prompt once: prompt id -> sentence -> scores."""
    items = []
    for tree in trees:
        groups = candidates[tree.prompt.prompt_id].values()
        sentences = dict.fromkeys(c.sentence for siblings in groups for c in siblings if c.sentence)
        items += [(tree.prompt, sentence) for sentence in sentences]
    scored: dict[str, dict[str, _Scores]] = {tree.prompt.prompt_id: {} for tree in trees}
    for (prompt, sentence), scores in zip(items, score(items), strict=True):
        scored[prompt.prompt_id][sentence] = scores
    return scored


def select_beam(
    nodes: Sequence[Node], candidates: Sequence[Node], method: MethodConfig, scorer: str
) -> dict[str, NodeStatus]:
    """Select the top-k and the bottom-k partial responses; ties go to the earlier node.

    Args:
        nodes: All nodes of the prompt so far, including the candidates.
        candidates: Nodes of this round that can be expanded.
        method: Settings of search and reward.
        scorer: Columns that the reward uses.

    Returns:
        The status of each selected node, by its id: the best ones first, then the worst ones,
        starting from the worst.
    """
    scores = steering_scores(nodes, candidates, method, scorer)
    if len(candidates) < method.search.keep_all_below:
        return dict.fromkeys((node.node_id for node in candidates), NodeStatus.TOP)
    best_first = sorted(candidates, key=lambda node: -scores[node.node_id])
    top = best_first[: method.search.keep_top]
    rest = best_first[method.search.keep_top :]
    worst_first = sorted(rest, key=lambda node: scores[node.node_id])
    bottom = worst_first[: method.search.keep_bottom]
    return {node.node_id: NodeStatus.TOP for node in top} | {node.node_id: NodeStatus.BOTTOM for node in bottom}


def steering_scores(
    nodes: Sequence[Node], candidates: Sequence[Node], method: MethodConfig, scorer: str
) -> dict[str, float]:
    """Compute the scores that rank the partial responses s_1..s_n that end in the candidates, by node id.

    - ``sentence``: R(s_n)
    - ``response``: R(y) of s_1..s_n
    - ``logprob``: log P(s_1..s_n) per token
    - ``sentence_logprobs``: sum_i log P(s_i) per token of s_i
    """
    by_id = {node.node_id: node for node in nodes}
    paths = {node.node_id: [by_id[ancestor] for ancestor in path_ids(node.node_id)] for node in candidates}
    if method.search.steer_by == "sentence_logprobs":
        return {node_id: sum(node.logprob / len(node.token_ids) for node in path) for node_id, path in paths.items()}
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
