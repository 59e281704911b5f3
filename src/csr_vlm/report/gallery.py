"""Pictures with responses: the pairs of each iteration, and base against final policy."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow.parquet as pq
from markupsafe import Markup, escape

from csr_vlm.batches import spread
from csr_vlm.errors import CsrError
from csr_vlm.method.reward import image_score, path_ids
from csr_vlm.records import Node, Pair, Response
from csr_vlm.report.measures import Evaluation, shared_rows
from csr_vlm.report.pictures import Picture, absent_kinds, picture
from csr_vlm.store import tables
from csr_vlm.store.run import Run
from csr_vlm.world.dataset import scene_of
from csr_vlm.world.truth import judge

MOST_PROMPTS = 60
MOST_SCENES = 24
SCALE_STEPS = 7
_WORD = re.compile(r"[A-Za-z]+")
_ABSENT = Markup(
    '<mark class="absent" title="not in the picture">{}<span class="spoken"> (not in the picture)</span></mark>'
)
Change = Literal["improved", "worsened", "still hallucinating", "clean"]


@dataclass(frozen=True)
class Sentence:
    markup: Markup
    relevance: float | None
    """R_I, 0 to 100; None where it was not measured."""


@dataclass(frozen=True)
class Told:
    """A response of a pair, sentence by sentence."""

    reward: float
    sentences: Sequence[Sentence]
    complete: bool


@dataclass(frozen=True)
class Preference:
    iteration: int
    chosen: Told
    rejected: Told

    @property
    def margin(self) -> float:
        return self.chosen.reward - self.rejected.reward


@dataclass(frozen=True)
class PairCard:
    prompt_id: str
    question: str
    picture: Picture
    preferences: Sequence[Preference]


@dataclass(frozen=True)
class Scale:
    """Which colour step a relevance has; the ends are the gallery's own extremes."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Scale:
        ordered = sorted(values) or [0.0]
        # A few outliers must not wash out everybody else.
        edge = len(ordered) // 50
        return cls(ordered[edge], ordered[-1 - edge])

    def step(self, value: float) -> int:
        if self.high <= self.low:
            return SCALE_STEPS // 2
        return max(0, min(int((value - self.low) / (self.high - self.low) * SCALE_STEPS), SCALE_STEPS - 1))


@dataclass(frozen=True)
class PairGallery:
    cards: Sequence[PairCard]
    iterations: Sequence[int]
    num_prompts: int
    """Prompts with a pair in any iteration, shown or not."""
    scale: Scale
    truth_known: bool


@dataclass(frozen=True)
class Described:
    """A policy's description of a scene."""

    markup: Markup
    relevance: float | None
    unmentioned: Sequence[str]
    num_hallucinated: int


@dataclass(frozen=True)
class SceneCard:
    scene_id: str
    picture: Picture
    change: Change
    before: Described
    after: Described


@dataclass(frozen=True)
class SceneGallery:
    cards: Sequence[SceneCard]
    totals: Mapping[Change, int]
    last: int


def marked(text: str, absent: Collection[str]) -> Markup:
    """Escape a text and mark its words that name something absent."""
    parts: list[Markup] = []
    at = 0
    for word in _WORD.finditer(text):
        if word.group().lower() in absent:
            parts += [escape(text[at : word.start()]), _ABSENT.format(word.group())]
            at = word.end()
    return Markup("").join([*parts, escape(text[at:])])


def pair_gallery(run: Run) -> PairGallery | None:
    """Gather the pairs of some prompts, the same prompts in every iteration; None without pairs."""
    iterations = [n for n in range(1, run.config.iterations + 1) if run.is_done(n, "pairs")]
    iterations = [n for n in iterations if run.pairs_path(n).is_file()]
    ids = dict.fromkeys(prompt_id for n in iterations for prompt_id in _prompt_ids(run, n))
    if not ids:
        return None
    shown = spread(list(ids), MOST_PROMPTS)
    found: dict[str, list[tuple[Pair, Preference]]] = {prompt_id: [] for prompt_id in shown}
    for number in iterations:
        told = _sentences(run, number, shown)
        for pair in tables.read_pairs(run.pairs_path(number)):
            if pair.prompt.prompt_id in found:
                nodes = told.get(pair.prompt.prompt_id, {})
                found[pair.prompt.prompt_id].append((pair, _preference(pair, number, nodes)))
    cards = [_pair_card(run, mine) for mine in found.values() if mine]
    scores = [
        sentence.relevance
        for card in cards
        for preference in card.preferences
        for response in (preference.chosen, preference.rejected)
        for sentence in response.sentences
        if sentence.relevance is not None
    ]
    known = any(scene_of(card.prompt_id) is not None for card in cards)
    return PairGallery(cards, iterations, len(ids), Scale.of(scores), known)


def _prompt_ids(run: Run, iteration: int) -> list[str]:
    column = pq.read_table(run.pairs_path(iteration), columns=["prompt_id"]).column("prompt_id")
    ids: list[str] = column.to_pylist()
    return ids


def _sentences(run: Run, iteration: int, prompt_ids: Sequence[str]) -> dict[str, dict[str, tuple[str, float | None]]]:
    """Map prompt and node id to a sentence and its R_I as the reward takes it.

    Only the shown prompts' rows are decoded: a ledger has millions of nodes.
    """
    found: dict[str, dict[str, tuple[str, float | None]]] = {}
    for part in run.ledger_parts(iteration):
        for node in tables.read_nodes_of(part, prompt_ids):
            found.setdefault(node.prompt_id, {})[node.node_id] = (node.sentence, _relevance(run, node))
    return found


def _relevance(run: Run, node: Node) -> float | None:
    """R_I of a sentence; None where the ledger lacks a score that it needs."""
    try:
        return image_score(node, run.config.scorer.used, run.config.method.reward)
    except CsrError:
        return None


def _preference(pair: Pair, iteration: int, nodes: Mapping[str, tuple[str, float | None]]) -> Preference:
    absent = absent_kinds(pair.prompt.prompt_id) or frozenset()
    return Preference(iteration, _told(pair.chosen, nodes, absent), _told(pair.rejected, nodes, absent))


def _told(response: Response, nodes: Mapping[str, tuple[str, float | None]], absent: Collection[str]) -> Told:
    path = [nodes.get(node_id) for node_id in path_ids(response.node_id)]
    # A ledger that was moved away still leaves the response's own text.
    rows = [row for row in path if row is not None] if None not in path else [(response.text, None)]
    sentences = [Sentence(marked(text, absent), relevance) for text, relevance in rows if text]
    return Told(response.reward, sentences, response.complete)


def _pair_card(run: Run, mine: Sequence[tuple[Pair, Preference]]) -> PairCard:
    prompt = mine[0][0].prompt
    drawn = picture(prompt.prompt_id, prompt.image, run.config.data.max_image_pixels)
    return PairCard(prompt.prompt_id, prompt.text, drawn, [preference for _, preference in mine])


def scene_gallery(evaluation: Evaluation) -> SceneGallery | None:
    """Set the base policy's descriptions against the last one's; None where there are not both."""
    by_change: dict[Change, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {
        "improved": [],
        "worsened": [],
        "still hallucinating": [],
        "clean": [],
    }
    for before, after in shared_rows(evaluation):
        by_change[change(before, after)].append((before, after))
    totals = {name: len(rows) for name, rows in by_change.items()}
    if not sum(totals.values()):
        return None
    cards = [
        _scene_card(name, *rows) for name, number in _shares(totals).items() for rows in spread(by_change[name], number)
    ]
    return SceneGallery(cards, totals, evaluation.last)


def change(before: Mapping[str, Any], after: Mapping[str, Any]) -> Change:
    """Compare the number of hallucinated mentions in two rows."""
    first, last = len(before["hallucinated"]), len(after["hallucinated"])
    if last < first:
        return "improved"
    if last > first:
        return "worsened"
    return "still hallucinating" if last else "clean"


def _shares(totals: Mapping[Change, int]) -> dict[Change, int]:
    """Divide the places: half for the improved, a quarter each for the others; the rest to who has more."""
    wanted: tuple[Change, ...] = ("improved", "worsened", "still hallucinating")
    places = {"improved": MOST_SCENES // 2, "worsened": MOST_SCENES // 4, "still hallucinating": MOST_SCENES // 4}
    taken = {name: min(totals[name], places[name]) for name in wanted}
    for name in wanted:
        taken[name] += min(totals[name] - taken[name], MOST_SCENES - sum(taken.values()))
    return taken


def _scene_card(name: Change, before: Mapping[str, Any], after: Mapping[str, Any]) -> SceneCard:
    scene_id = str(before["id"])
    return SceneCard(scene_id, picture(scene_id, None, 0), name, _described(before), _described(after))


def _described(row: Mapping[str, Any]) -> Described:
    hallucinated = [str(word) for word in row["hallucinated"]]
    known = scene_of(str(row["id"]))
    text = str(row["text"])
    unmentioned: list[str] = []
    if known is not None:
        world, scene = known
        unmentioned = sorted(scene.kinds - judge(world, scene, text).recalled)
    return Described(marked(text, set(hallucinated)), row.get("relevance"), unmentioned, len(hallucinated))
