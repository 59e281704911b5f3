"""The base policy's responses against the last one's, on prompts that nothing was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from csr_vlm.core.batching import evenly_spaced
from csr_vlm.evaluation.known_pictures import TruthOf, no_truth
from csr_vlm.report.annotate import Scale, Sentence, sentences
from csr_vlm.report.limits import Sample
from csr_vlm.report.measures import Evaluation, shared_rows
from csr_vlm.report.pictures import Picture, picture
from csr_vlm.store.run import Run

Tone = Literal["better", "worse", "none"]
NOTICEABLE_RELEVANCE = 0.5
"""A response whose mean R_I moved by less than this counts as the same."""


@dataclass(frozen=True)
class Kind:
    """How a response changed."""

    name: str
    tone: Tone


IMPROVED, WORSENED = Kind("improved", "better"), Kind("worsened", "worse")
STILL, CLEAN = Kind("still hallucinating", "worse"), Kind("clean", "none")
CLOSER, FARTHER, SAME = Kind("more relevant", "better"), Kind("less relevant", "worse"), Kind("as before", "none")
_BY_TRUTH = (IMPROVED, WORSENED, STILL, CLEAN)
_BY_RELEVANCE = (CLOSER, FARTHER, SAME)


@dataclass(frozen=True)
class Described:
    """A policy's response to a prompt."""

    sentences: Sequence[Sentence]
    relevance: float | None
    """Mean R_I of its sentences."""
    unmentioned: Sequence[str]
    num_hallucinated: int | None
    """None where the truth is not known."""


@dataclass(frozen=True)
class Card:
    prompt_id: str
    question: str
    picture: Picture
    kind: Kind
    before: Described
    after: Described

    @property
    def change(self) -> float | None:
        """Of the mean relevance."""
        if self.before.relevance is None or self.after.relevance is None:
            return None
        return self.after.relevance - self.before.relevance


@dataclass(frozen=True)
class BeforeAfter:
    cards: Sequence[Card]
    totals: Mapping[Kind, int]
    first: int
    last: int
    truth_known: bool
    scale: Scale


def before_after(run: Run, evaluation: Evaluation, sample: Sample, truth_of: TruthOf = no_truth) -> BeforeAfter | None:
    """Set the base policy's responses against the last one's; None where there are not both."""
    rows = shared_rows(evaluation)
    if not rows:
        return None
    by_kind: dict[Kind, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {
        kind: [] for kind in (_BY_TRUTH if evaluation.truth_known else _BY_RELEVANCE)
    }
    for before, after in rows:
        by_kind[(by_truth if evaluation.truth_known else by_relevance)(before, after)].append((before, after))
    totals = {kind: len(mine) for kind, mine in by_kind.items()}
    asked = {prompt.prompt_id: prompt for prompt in run.heldout()} if run.heldout_path.is_file() else {}
    cards = []
    for kind, number in _shares(totals, sample.compared).items():
        for before, after in evenly_spaced(by_kind[kind], number):
            name = str(before["id"])
            prompt = asked.get(name)
            image = picture(name, prompt.image if prompt else None, run.config.data.max_image_pixels, truth_of)
            sides = (_described(row, truth_of) for row in (before, after))
            cards.append(Card(name, prompt.text if prompt else "", image, kind, *sides))
    scale = Scale.of(s for card in cards for side in (card.before, card.after) for s in side.sentences)
    return BeforeAfter(cards, totals, evaluation.first, evaluation.last, evaluation.truth_known, scale)


def by_truth(before: Mapping[str, Any], after: Mapping[str, Any]) -> Kind:
    """Compare the number of hallucinated mentions in two rows."""
    first, last = len(before["hallucinated"]), len(after["hallucinated"])
    if last < first:
        return IMPROVED
    if last > first:
        return WORSENED
    return STILL if last else CLEAN


def by_relevance(before: Mapping[str, Any], after: Mapping[str, Any]) -> Kind:
    """Compare the mean R_I of two rows; silence counts as irrelevant."""
    change = (_relevance(after) or 0.0) - (_relevance(before) or 0.0)
    if abs(change) < NOTICEABLE_RELEVANCE:
        return SAME
    return CLOSER if change > 0 else FARTHER


def _shares(totals: Mapping[Kind, int], places: int) -> dict[Kind, int]:
    """Divide the places: half for the first kind, a quarter each for the next two; the rest to who has more.

    What is clean both times teaches nothing and is not shown.
    """
    wanted = list(totals)[:3]
    share = dict(zip(wanted, (places - places // 4 * 2, places // 4, places // 4), strict=True))
    taken = {kind: min(totals[kind], share[kind]) for kind in wanted}
    for kind in wanted:
        taken[kind] += min(totals[kind] - taken[kind], places - sum(taken.values()))
    return taken


def _relevance(row: Mapping[str, Any]) -> float | None:
    found = row.get("relevance")
    if found is None:
        total, number = row.get("tallies", {}).get("relevance", (0.0, 0))
        found = total / number if number else None
    return found


def _described(row: Mapping[str, Any], truth_of: TruthOf) -> Described:
    hallucinated = row.get("hallucinated")
    absent = {str(word) for word in row.get("hallucinated_words") or hallucinated or ()}
    text = str(row["text"])
    said = [(str(part), score) for part, score in row.get("sentences") or [(text, None)]]
    known = truth_of(str(row["id"])) if hallucinated is not None else None
    unmentioned = known.unmentioned(text) if known is not None else ()
    number = None if hallucinated is None else len(hallucinated)
    return Described(sentences(said, absent), _relevance(row), unmentioned, number)
