"""Compare responses of the first and the last policy to prompts that were not trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from csr_vlm.core.batching import evenly_spaced
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt
from csr_vlm.evaluation.claim_marker import num_doubted
from csr_vlm.evaluation.known_pictures import TruthOf, no_truth
from csr_vlm.method.claims import ClaimFinder, claim_finder
from csr_vlm.report.annotate import AnnotatedSentence, ColorScale, annotate, mark_claims
from csr_vlm.report.evaluations import Evaluation, paired_rows
from csr_vlm.report.limits import Sample
from csr_vlm.report.pictures import Picture, embed_picture
from csr_vlm.store.run import Run

Tone = Literal["better", "worse", "none"]
NOTICEABLE_RELEVANCE = 0.5
"""A response whose mean R_I changed by less counts as unchanged."""


@dataclass(frozen=True)
class Change:
    """Classify how the response to a prompt changed."""

    name: str
    tone: Tone


IMPROVED, WORSENED = Change("improved", "better"), Change("worsened", "worse")
STILL_HALLUCINATING, CLEAN = Change("still hallucinating", "worse"), Change("without hallucination", "none")
FEWER_DOUBTED, MORE_DOUBTED = Change("fewer doubted claims", "better"), Change("more doubted claims", "worse")
MORE_RELEVANT, LESS_RELEVANT = Change("more relevant", "better"), Change("less relevant", "worse")
UNCHANGED = Change("unchanged", "none")


@dataclass(frozen=True)
class PolicyResponse:
    """Represent a policy's response to a prompt."""

    sentences: Sequence[AnnotatedSentence]
    relevance: float | None
    """Mean R_I of the sentences."""
    unmentioned: Sequence[str]
    """Objects in the image that the response does not mention."""
    num_hallucinated: int | None
    """Mentions of absent objects; None if the objects in the image are not known."""
    num_doubted: int | None = None
    """Claims with evidence against them; None if claims were not weighed."""


@dataclass(frozen=True)
class ComparisonCard:
    """Represent a prompt with the responses of both policies."""

    prompt_id: str
    question: str
    picture: Picture
    change: Change
    before: PolicyResponse
    after: PolicyResponse

    @property
    def relevance_change(self) -> float | None:
        """Return the change of the mean R_I."""
        if self.before.relevance is None or self.after.relevance is None:
            return None
        return self.after.relevance - self.before.relevance


@dataclass(frozen=True)
class BeforeAfter:
    """Hold the shown prompts and the number of prompts per kind of change."""

    cards: Sequence[ComparisonCard]
    totals: Mapping[Change, int]
    first: int
    last: int
    truth_known: bool
    scale: ColorScale
    by_claim: bool = False
    """Whether claims are marked by their evidence, rather than sentences by their relevance."""


def before_after(run: Run, evaluation: Evaluation, sample: Sample, truth_of: TruthOf = no_truth) -> BeforeAfter | None:
    """Compare the responses to a sample of the prompts; None unless two policies answered them."""
    rows = paired_rows(evaluation)
    if not rows:
        return None
    finder = _claim_finder(run, rows)
    classify, changes = _classification(evaluation.truth_known, finder is not None)
    by_change: dict[Change, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {change: [] for change in changes}
    for before, after in rows:
        by_change[classify(before, after)].append((before, after))
    totals = {change: len(pairs) for change, pairs in by_change.items()}
    prompts = heldout_prompts(run)
    cards = []
    for change, num_shown in _allocate(totals, sample.compared).items():
        for before, after in evenly_spaced(by_change[change], num_shown):
            prompt_id = str(before["id"])
            prompt = prompts.get(prompt_id)
            picture = embed_picture(prompt_id, prompt, run.config.data.max_image_pixels, truth_of)
            responses = (_response(row, truth_of, finder) for row in (before, after))
            cards.append(ComparisonCard(prompt_id, prompt.text if prompt else "", picture, change, *responses))
    scale = ColorScale.of(s for card in cards for response in (card.before, card.after) for s in response.sentences)
    first, last, known = evaluation.first, evaluation.last, evaluation.truth_known
    return BeforeAfter(cards, totals, first, last, known, scale, finder is not None)


def _claim_finder(run: Run, rows: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> ClaimFinder | None:
    """Return what finds the claims of responses; None if they were not weighed, or the run's lexicon is missing."""
    if not all("evidence" in row for pair in rows for row in pair):
        return None
    try:
        return claim_finder(run.config.method.claims.lexicon)
    except CsrError:
        return None


def _classification(truth_known: bool, by_claim: bool) -> tuple[Callable[..., Change], Sequence[Change]]:
    """Return what compares two rows, and the changes that it may find."""
    if truth_known:
        return hallucination_change, (IMPROVED, WORSENED, STILL_HALLUCINATING, CLEAN)
    if by_claim:
        return doubt_change, (FEWER_DOUBTED, MORE_DOUBTED, UNCHANGED)
    return relevance_change, (MORE_RELEVANT, LESS_RELEVANT, UNCHANGED)


def heldout_prompts(run: Run) -> dict[str, Prompt]:
    """Return the held-out prompts by id; empty if the run has none."""
    return {prompt.prompt_id: prompt for prompt in run.heldout()} if run.heldout_path.is_file() else {}


def hallucination_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> Change:
    """Compare the number of hallucinated mentions in two rows."""
    num_before, num_after = len(before["hallucinated"]), len(after["hallucinated"])
    if num_after < num_before:
        return IMPROVED
    if num_after > num_before:
        return WORSENED
    return STILL_HALLUCINATING if num_after else CLEAN


def doubt_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> Change:
    """Compare the number of claims with evidence against them in two rows."""
    change = num_doubted(after["evidence"]) - num_doubted(before["evidence"])
    return MORE_DOUBTED if change > 0 else FEWER_DOUBTED if change < 0 else UNCHANGED


def relevance_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> Change:
    """Compare the mean R_I of two rows; an empty response counts as 0."""
    change = (_mean_relevance(after) or 0.0) - (_mean_relevance(before) or 0.0)
    if abs(change) < NOTICEABLE_RELEVANCE:
        return UNCHANGED
    return MORE_RELEVANT if change > 0 else LESS_RELEVANT


def _allocate(totals: Mapping[Change, int], num_cards: int) -> dict[Change, int]:
    """Divide the cards: half to the first kind of change, a quarter to each of the next two.

    Cards that a kind cannot fill go to the others. Responses without any hallucination are not shown.
    """
    changes = list(totals)[:3]
    shares = dict(zip(changes, (num_cards - num_cards // 4 * 2, num_cards // 4, num_cards // 4), strict=True))
    allocated = {change: min(totals[change], shares[change]) for change in changes}
    for change in changes:
        allocated[change] += min(totals[change] - allocated[change], num_cards - sum(allocated.values()))
    return allocated


def _mean_relevance(row: Mapping[str, Any]) -> float | None:
    relevance: float | None = row.get("relevance")
    if relevance is None:
        total, number = row.get("tallies", {}).get("relevance", (0.0, 0))
        relevance = total / number if number else None
    return relevance


def absent_words(row: Mapping[str, Any]) -> set[str]:
    """Return the words of a row's response that name absent objects; empty if those are not known."""
    return {str(word) for word in row.get("hallucinated_words") or row.get("hallucinated") or ()}


def _response(row: Mapping[str, Any], truth_of: TruthOf, finder: ClaimFinder | None) -> PolicyResponse:
    hallucinated = row.get("hallucinated")
    text, absent = str(row["text"]), absent_words(row)
    sentences = [(str(part), score) for part, score in row.get("sentences") or [(text, None)]]
    known = truth_of(str(row["id"])) if hallucinated is not None else None
    unmentioned = known.unmentioned(text) if known is not None else ()
    num_hallucinated = None if hallucinated is None else len(hallucinated)
    if finder is None:
        return PolicyResponse(annotate(sentences, absent), _mean_relevance(row), unmentioned, num_hallucinated)
    evidence = row["evidence"]
    marked = [AnnotatedSentence(mark_claims(part, evidence, finder, absent), None) for part, _ in sentences if part]
    return PolicyResponse(marked, _mean_relevance(row), unmentioned, num_hallucinated, num_doubted(evidence))
