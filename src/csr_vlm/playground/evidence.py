"""Find the claims of an answer, and measure how well each fits the picture compared with other pictures.

Each claim is scored alone, as "There is a red boat.". With z the distance of its cosine from those of the
same words with other pictures, in their standard deviations, and delta the mean z of the answer's n claims,
shrunk by n / (n + 1) and at least 0, the evidence of a claim in nats is the log-likelihood ratio of z under
N(delta, 1), present, and N(0, 1), absent:

    e(c) = delta z(c) - delta^2 / 2
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean, median, pstdev

from csr_vlm.core.records import Prompt
from csr_vlm.method.claims import claim_finder
from csr_vlm.method.lexicon import Claim
from csr_vlm.method.sentences import SentenceRule
from csr_vlm.scoring.scorer import ScorerGroup

_CLEAR = 1.0
"""Nats from which the evidence for or against a claim is clear."""
_SMALLEST = 1e-6


class Level(StrEnum):
    """Enumerate what the evidence says of a claim."""

    SUPPORTED = "supported"
    UNCLEAR = "unclear"
    DOUBTED = "doubted"


@dataclass(frozen=True)
class Mark:
    """Hold a claim at its place in a text."""

    start: int
    end: int
    thing: str
    """Name of what is claimed, with its color if the text gives one."""
    nats: float
    """Evidence for it; negative against it."""

    @property
    def level(self) -> Level:
        """Return what the evidence says: clearly for the claim, clearly against it, or neither."""
        if abs(self.nats) < _CLEAR:
            return Level.UNCLEAR
        return Level.SUPPORTED if self.nats > 0 else Level.DOUBTED


class ClaimMarker:
    """Mark the claims of texts about pictures.

    Args:
        scorer: Scorer of texts on pictures, without negative images.
        used: Scorers whose mean evidence counts, as in ``scorer.use``.
        lexicon: Lexicon of the claims.
        delimiters: Ends of sentences.
        others: Prompts with other pictures; at least two of them differ from the one that a text is about.
    """

    def __init__(self, scorer: ScorerGroup, used: str, lexicon: str, delimiters: str, others: Sequence[Prompt]) -> None:
        self._scorer = scorer
        self._names = used.split("+")
        self._finder = claim_finder(lexicon)
        self._is_english = lexicon == "en"
        self._rule = SentenceRule(delimiters)
        self._others = list({prompt.image: prompt for prompt in others}.values())
        self._known: dict[tuple[str, str], list[tuple[float, float]]] = {}
        """(contrast, spread) by scorer, of a picture and a thing."""

    def marks(self, prompt: Prompt, text: str) -> list[Mark]:
        """Return the claims of a text in their order, each as often as it is made."""
        found = list(self._places(text))
        things = list(dict.fromkeys(thing for _, _, thing in found))
        nats = self._evidence(prompt, things)
        return [Mark(start, end, thing, nats[thing]) for start, end, thing in found if thing in nats]

    def _places(self, text: str) -> list[tuple[int, int, str]]:
        places: list[tuple[int, int, str]] = []
        position = 0
        for sentence in self._rule.cut(text):
            position = text.index(sentence, position)
            for claim in self._finder.find(sentence):
                places += (
                    (position + match.start(), position + match.end(), _thing(claim))
                    for match in _pattern(claim).finditer(sentence)
                )
            position += len(sentence)
        return _without_overlaps(places)

    def _evidence(self, prompt: Prompt, things: Sequence[str]) -> dict[str, float]:
        """Return the evidence of each thing; nothing if there are no other pictures to compare with."""
        others = [other for other in self._others if other.image != prompt.image]
        if len(others) < 2 or not things:
            return {}
        self._score(prompt, [thing for thing in things if (prompt.image, thing) not in self._known], others)
        total = dict.fromkeys(things, 0.0)
        for index in range(len(self._names)):
            columns = {thing: self._known[prompt.image, thing][index] for thing in things}
            sigma = max(median(spread for _, spread in columns.values()), _SMALLEST)
            z = {thing: contrast / sigma for thing, (contrast, _) in columns.items()}
            delta = max(0.0, sum(z.values()) / (len(z) + 1))
            for thing in things:
                total[thing] += (delta * z[thing] - delta**2 / 2) / len(self._names)
        return total

    def _score(self, prompt: Prompt, things: Sequence[str], others: Sequence[Prompt]) -> None:
        items = [(each, self._caption(thing)) for thing in things for each in (prompt, *others)]
        rows = iter(self._scorer.score(items))
        for thing in things:
            values = [next(rows) for _ in range(len(others) + 1)]
            self._known[prompt.image, thing] = [
                (values[0][name] - fmean(row[name] for row in values[1:]), pstdev(row[name] for row in values[1:]))
                for name in self._names
            ]

    def _caption(self, thing: str) -> str:
        if not self._is_english:
            return thing
        return f"There is {'an' if thing[0] in 'aeiou' else 'a'} {thing}."


def _thing(claim: Claim) -> str:
    return f"{claim.color} {claim.name}".strip()


def _pattern(claim: Claim) -> re.Pattern[str]:
    """Compile a pattern of a claim's wording, with its color where that stands before it."""
    wording = re.escape(claim.wording).replace(r"\ ", r"\s+").replace("'", "['’]")
    color = rf"(?:{re.escape(claim.color)}\s+)?" if claim.color else ""
    bounds = (r"(?<!\w)", r"(?!\w)") if claim.wording.isascii() else ("", "")
    return re.compile(f"{bounds[0]}{color}{wording}{bounds[1]}", re.IGNORECASE)


def _without_overlaps(places: Sequence[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Sort places and keep the longer of two that overlap."""
    kept: list[tuple[int, int, str]] = []
    for place in sorted(places, key=lambda place: (place[0], -place[1])):
        if not kept or place[0] >= kept[-1][1]:
            kept.append(place)
    return kept
