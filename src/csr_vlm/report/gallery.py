"""Show the preference pairs of each iteration with pictures, responses and search trees."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import pyarrow.parquet as pq

from csr_vlm.core.batching import evenly_spaced
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Node, Pair, Prompt, Response
from csr_vlm.evaluation.known_pictures import TruthOf, no_truth
from csr_vlm.method.reward import image_score, path_ids
from csr_vlm.report.annotate import AnnotatedSentence, ColorScale, annotate
from csr_vlm.report.limits import Sample, shorten
from csr_vlm.report.pictures import Picture, embed_picture
from csr_vlm.report.search_tree import SearchTree, search_tree
from csr_vlm.report.why import ClaimReasons, Why
from csr_vlm.store import ledger
from csr_vlm.store.run import Run


@dataclass(frozen=True)
class PairResponse:
    """Represent the chosen or the rejected response of a pair."""

    reward: float
    sentences: Sequence[AnnotatedSentence]
    complete: bool
    ends_here: bool
    """Whether the last candidate is the end of the response rather than a sentence."""


@dataclass(frozen=True)
class ShownPair:
    """Represent a preference pair."""

    chosen: PairResponse
    rejected: PairResponse
    why: Why | None = None
    """Claims and their evidence; None if the rewards are not by claim, or cannot be computed."""

    @property
    def margin(self) -> float:
        """Return the difference of the rewards."""
        return self.chosen.reward - self.rejected.reward


@dataclass(frozen=True)
class IterationPairs:
    """Represent the pairs of a prompt in one iteration."""

    iteration: int
    pairs: Sequence[ShownPair]
    tree: SearchTree | None
    """None if the ledger does not contain the prompt: external pairs, or a ledger that was removed."""

    @property
    def margin(self) -> float:
        """Return the largest margin."""
        return max(pair.margin for pair in self.pairs)


@dataclass(frozen=True)
class PairCard:
    """Represent a prompt with its pairs in every shown iteration."""

    prompt_id: str
    question: str
    picture: Picture
    iterations: Sequence[IterationPairs]


@dataclass(frozen=True)
class PairGallery:
    """Hold the cards of some prompts."""

    cards: Sequence[PairCard]
    iterations: Sequence[int]
    num_prompts: int
    """Prompts with a pair in any iteration, shown or not."""
    scale: ColorScale
    truth_known: bool
    has_trees: bool
    by_claim: bool
    """Whether claims are marked by their evidence, rather than sentences by their relevance."""


def pair_gallery(run: Run, sample: Sample, truth_of: TruthOf = no_truth) -> PairGallery | None:
    """Gather the pairs of a sample of prompts, the same prompts in every iteration; None without pairs."""
    done = [n for n in run.iterations_done("pairs") if n]
    prompt_ids = list(dict.fromkeys(prompt_id for number in done for prompt_id in _prompt_ids(run, number)))
    if not prompt_ids:
        return None
    # Sampled from the end, so that the last iteration is always shown.
    iterations = sorted(evenly_spaced(done[::-1], sample.iterations))
    shown_ids = evenly_spaced(prompt_ids, sample.prompts)
    by_prompt: dict[str, list[IterationPairs]] = {prompt_id: [] for prompt_id in shown_ids}
    prompts: dict[str, Prompt] = {}
    for number in iterations:
        trees = ledger.nodes_of(run, number, shown_ids)
        for prompt_id, pairs in _pairs(run, number, shown_ids).items():
            prompts[prompt_id] = pairs[0].prompt
            by_prompt[prompt_id].append(_iteration_pairs(run, number, pairs, trees.get(prompt_id, []), truth_of))
    max_pixels = run.config.data.max_image_pixels
    cards = [
        PairCard(
            prompt_id,
            shorten(prompts[prompt_id].text),
            embed_picture(prompt_id, prompts[prompt_id], max_pixels, truth_of),
            by_prompt[prompt_id],
        )
        for prompt_id in shown_ids
        if prompt_id in prompts
    ]
    shown = [iteration for card in cards for iteration in card.iterations]
    responses = [response for item in shown for pair in item.pairs for response in (pair.chosen, pair.rejected)]
    scale = ColorScale.of(sentence for response in responses for sentence in response.sentences)
    truth_known = any(truth_of(card.prompt_id) is not None for card in cards)
    has_trees = any(item.tree is not None for item in shown)
    by_claim = any(pair.why is not None for item in shown for pair in item.pairs)
    return PairGallery(cards, iterations, len(prompt_ids), scale, truth_known, has_trees, by_claim)


def _prompt_ids(run: Run, iteration: int) -> list[str]:
    run.verify(iteration, "pairs")
    column = pq.read_table(run.pairs_path(iteration), columns=["prompt_id"]).column("prompt_id")
    prompt_ids: list[str] = column.to_pylist()
    return prompt_ids


def _pairs(run: Run, iteration: int, prompt_ids: Collection[str]) -> dict[str, list[Pair]]:
    """Read the pairs of some prompts, by prompt."""
    pairs: dict[str, list[Pair]] = defaultdict(list)
    wanted = set(prompt_ids)
    for pair in run.pairs(iteration):
        if pair.prompt.prompt_id in wanted:
            pairs[pair.prompt.prompt_id].append(pair)
    return pairs


def _iteration_pairs(
    run: Run, iteration: int, pairs: Sequence[Pair], nodes: Sequence[Node], truth_of: TruthOf
) -> IterationPairs:
    known = truth_of(pairs[0].prompt.prompt_id)
    absent = known.absent if known is not None else frozenset()
    by_id = {node.node_id: node for node in nodes}
    reasons, shown = _claim_reasons(nodes, run), []
    for pair in pairs:
        num_in_both = _num_in_both(pair)
        sides = (pair.chosen, pair.rejected)
        chosen, rejected = (_response(run, side, by_id, absent, num_in_both, reasons) for side in sides)
        is_explained = reasons is not None and all(side.node_id in by_id for side in sides)
        shown.append(ShownPair(chosen, rejected, reasons.pair(*sides) if reasons and is_explained else None))
    return IterationPairs(iteration, shown, search_tree(nodes, pairs, run.config) if nodes else None)


def _claim_reasons(nodes: Sequence[Node], run: Run) -> ClaimReasons | None:
    """Return the reasons of a tree; None if rewards are not by claim, or the ledger lacks nodes or scores."""
    ids = {node.node_id for node in nodes}
    is_whole = bool(nodes) and all(ids.issuperset(path_ids(node.node_id)) for node in nodes)
    if run.config.method.reward.unit != "claim" or not is_whole:
        return None
    try:
        return ClaimReasons(nodes, run.config)
    except CsrError:
        return None


def _num_in_both(pair: Pair) -> int:
    """Count the sentences that both responses start with; pairs of siblings differ in the last one only."""
    paths = (path_ids(side.node_id) for side in (pair.chosen, pair.rejected))
    return sum(chosen == rejected for chosen, rejected in zip(*paths, strict=False))


def _response(
    run: Run,
    response: Response,
    nodes: Mapping[str, Node],
    absent: Collection[str],
    num_in_both: int,
    reasons: ClaimReasons | None,
) -> PairResponse:
    ids = path_ids(response.node_id)
    path = [nodes[node_id] for node_id in ids if node_id in nodes]
    # Without the ledger, the text of the response is all there is.
    has_nodes = len(path) == len(ids)
    ends_here = has_nodes and not path[-1].sentence
    if reasons is not None and has_nodes:
        said = [node for node in path if node.sentence]
        sentences: Sequence[AnnotatedSentence] = [
            reasons.sentence(node, absent, index < num_in_both) for index, node in enumerate(said)
        ]
    else:
        rows = [(node.sentence, _relevance(run, node)) for node in path] if has_nodes else [(response.text, None)]
        sentences = annotate(rows, absent, num_in_both if has_nodes else 0)
    return PairResponse(response.reward, sentences, response.complete, ends_here)


def _relevance(run: Run, node: Node) -> float | None:
    """Return the R_I that the reward uses; None if the ledger lacks a score that it needs."""
    try:
        return image_score(node, run.config.scorer.used, run.config.method.reward)
    except CsrError:
        return None
