"""The pairs of each iteration, as pictures with responses and search trees."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import pyarrow.parquet as pq

from csr_vlm.core.batching import evenly_spaced
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Node, Pair, Response
from csr_vlm.evaluation.known_pictures import TruthOf, no_truth
from csr_vlm.method.reward import image_score, path_ids
from csr_vlm.report.annotate import Scale, Sentence, sentences
from csr_vlm.report.limits import Sample, cut
from csr_vlm.report.pictures import Picture, picture
from csr_vlm.report.search_tree import SearchTree, search_tree
from csr_vlm.store import tables
from csr_vlm.store.run import Run


@dataclass(frozen=True)
class Told:
    """A response of a pair, sentence by sentence."""

    reward: float
    sentences: Sequence[Sentence]
    complete: bool
    ends_here: bool
    """Whether what it prefers or refuses, last of all, is to say no more."""


@dataclass(frozen=True)
class Preference:
    chosen: Told
    rejected: Told

    @property
    def margin(self) -> float:
        return self.chosen.reward - self.rejected.reward


@dataclass(frozen=True)
class Round:
    """What one iteration made of a prompt."""

    iteration: int
    preferences: Sequence[Preference]
    tree: SearchTree | None
    """None where the ledger has no such prompt: pairs from outside, or a ledger that was moved away."""

    @property
    def margin(self) -> float:
        """The widest."""
        return max(preference.margin for preference in self.preferences)


@dataclass(frozen=True)
class PairCard:
    prompt_id: str
    question: str
    picture: Picture
    rounds: Sequence[Round]


@dataclass(frozen=True)
class PairGallery:
    cards: Sequence[PairCard]
    iterations: Sequence[int]
    num_prompts: int
    """Prompts with a pair in any iteration, shown or not."""
    scale: Scale
    truth_known: bool
    has_trees: bool


def pair_gallery(run: Run, sample: Sample, truth_of: TruthOf = no_truth) -> PairGallery | None:
    """Gather the pairs of some prompts, the same prompts in every iteration; None without pairs."""
    done = [n for n in run.iterations_done("pairs") if n and run.pairs_path(n).is_file()]
    ids = dict.fromkeys(prompt_id for n in done for prompt_id in _prompt_ids(run, n))
    if not ids:
        return None
    # The last iteration is the one that people look for.
    iterations = sorted(evenly_spaced(done[::-1], sample.iterations))
    shown = evenly_spaced(list(ids), sample.prompts)
    rounds: dict[str, list[Round]] = {prompt_id: [] for prompt_id in shown}
    prompts = {}
    for number in iterations:
        trees = _trees(run, number, shown)
        for prompt_id, pairs in _pairs(run, number, shown).items():
            prompts[prompt_id] = pairs[0].prompt
            rounds[prompt_id].append(_round(run, number, pairs, trees.get(prompt_id, []), truth_of))
    most = run.config.data.max_image_pixels
    cards = [
        PairCard(prompt_id, cut(prompt.text), picture(prompt_id, prompt.image, most, truth_of), rounds[prompt_id])
        for prompt_id, prompt in sorted(prompts.items(), key=lambda item: shown.index(item[0]))
    ]
    every = [found for card in cards for found in card.rounds]
    said = [s for r in every for p in r.preferences for side in (p.chosen, p.rejected) for s in side.sentences]
    known = any(truth_of(card.prompt_id) is not None for card in cards)
    return PairGallery(cards, iterations, len(ids), Scale.of(said), known, any(r.tree is not None for r in every))


def _prompt_ids(run: Run, iteration: int) -> list[str]:
    column = pq.read_table(run.pairs_path(iteration), columns=["prompt_id"]).column("prompt_id")
    ids: list[str] = column.to_pylist()
    return ids


def _pairs(run: Run, iteration: int, prompt_ids: Collection[str]) -> dict[str, list[Pair]]:
    """Read the pairs of some prompts, by prompt."""
    found: dict[str, list[Pair]] = defaultdict(list)
    wanted = set(prompt_ids)
    for pair in tables.read_pairs(run.pairs_path(iteration)):
        if pair.prompt.prompt_id in wanted:
            found[pair.prompt.prompt_id].append(pair)
    return found


def _trees(run: Run, iteration: int, prompt_ids: Sequence[str]) -> dict[str, list[Node]]:
    """Read the trees of some prompts; no other row is decoded, since a ledger has millions."""
    found: dict[str, list[Node]] = defaultdict(list)
    for part in run.ledger_parts(iteration):
        for node in tables.read_nodes_of(part, prompt_ids):
            found[node.prompt_id].append(node)
    return found


def _round(run: Run, iteration: int, pairs: Sequence[Pair], nodes: Sequence[Node], truth_of: TruthOf) -> Round:
    known = truth_of(pairs[0].prompt.prompt_id)
    absent = known.absent if known is not None else frozenset()
    by_id = {node.node_id: node for node in nodes}
    preferences = []
    for pair in pairs:
        shared = _num_shared(pair)
        sides = (_told(run, side, by_id, absent, shared) for side in (pair.chosen, pair.rejected))
        preferences.append(Preference(*sides))
    return Round(iteration, preferences, search_tree(nodes, pairs, run.config) if nodes else None)


def _num_shared(pair: Pair) -> int:
    """Count the sentences that both sides start with: siblings differ in the last only."""
    sides = (path_ids(side.node_id) for side in (pair.chosen, pair.rejected))
    return sum(chosen == rejected for chosen, rejected in zip(*sides, strict=False))


def _told(run: Run, response: Response, nodes: Mapping[str, Node], absent: Collection[str], num_shared: int) -> Told:
    path = [nodes[node_id] for node_id in path_ids(response.node_id) if node_id in nodes]
    # A ledger that was moved away still leaves the response's own text.
    whole = len(path) == len(path_ids(response.node_id))
    rows = [(node.sentence, _relevance(run, node)) for node in path] if whole else [(response.text, None)]
    ends_here = whole and not path[-1].sentence
    return Told(response.reward, sentences(rows, absent, num_shared if whole else 0), response.complete, ends_here)


def _relevance(run: Run, node: Node) -> float | None:
    """R_I of a sentence as the reward takes it; None where the ledger lacks a score that it needs."""
    try:
        return image_score(node, run.config.scorer.used, run.config.method.reward)
    except CsrError:
        return None
