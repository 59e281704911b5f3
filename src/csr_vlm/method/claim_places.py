"""Find where a text makes its claims, and say what the evidence for each is worth to a reader."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from csr_vlm.method.claim_evidence import claim_key
from csr_vlm.method.lexicon import Claim

_CLEAR = 1.0
"""Nats from which the evidence for or against a claim is clear."""


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
        return level_of(self.nats)


def level_of(nats: float) -> Level:
    """Return what evidence says of a claim.

    Example:
        >>> str(level_of(3.0)), str(level_of(0.5)), str(level_of(-3.0))
        ('supported', 'unclear', 'doubted')
    """
    if abs(nats) < _CLEAR:
        return Level.UNCLEAR
    return Level.SUPPORTED if nats > 0 else Level.DOUBTED


def claim_places(sentence: str, claims: Iterable[Claim]) -> list[tuple[int, int, str]]:
    """List (start, end, claim as in the ledger) of the words that make the claims of a sentence, without overlaps.

    Example:
        >>> from csr_vlm.method.claims import claim_finder
        >>> claim_places("There is a red boat.", claim_finder().find("There is a red boat."))
        [(11, 19, 'boat/red')]
    """
    return without_overlaps(
        (match.start(), match.end(), claim_key(claim.name, claim.color))
        for claim in claims
        for match in _pattern(claim).finditer(sentence)
    )


def _pattern(claim: Claim) -> re.Pattern[str]:
    """Compile a pattern of a claim's wording, with its color where that stands before it."""
    wording = re.escape(claim.wording).replace(r"\ ", r"\s+").replace("'", "['’]")
    color = rf"(?:{re.escape(claim.color)}\s+)?" if claim.color else ""
    bounds = (r"(?<!\w)", r"(?!\w)") if claim.wording.isascii() else ("", "")
    return re.compile(f"{bounds[0]}{color}{wording}{bounds[1]}", re.IGNORECASE)


def without_overlaps(places: Iterable[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Sort places and keep the longer of two that overlap."""
    kept: list[tuple[int, int, str]] = []
    for place in sorted(places, key=lambda place: (place[0], -place[1])):
        if not kept or place[0] >= kept[-1][1]:
            kept.append(place)
    return kept
