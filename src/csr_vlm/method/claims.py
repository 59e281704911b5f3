"""Find the claims of a sentence: the depictable things that it asserts of the image.

A claim is a thing of a lexicon. Plurals and synonyms make the same claim. What a sentence
negates, asks about, only supposes or compares with is not a claim. English is matched with its
inflection and its syntax (:mod:`csr_vlm.method.english`), other languages by the wordings of
their lexicon alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Protocol

from csr_vlm.method.english import EnglishClaims
from csr_vlm.method.lexicon import Claim, Lexicon

_CLAUSE_ENDS = re.compile(r"[.,;:!?。，；：！？\n]")


class ClaimFinder(Protocol):
    """Find the claims of sentences in one language."""

    def find(self, sentence: str) -> list[Claim]:
        """Return the distinct claims of a sentence in the order in which they appear."""
        ...


@cache
def claim_finder(lexicon: str = "en") -> ClaimFinder:
    """Return the finder for a lexicon.

    Args:
        lexicon: Language of a shipped lexicon (``en``, ``zh``), or path of a lexicon file.

    Raises:
        CsrError: There is no such lexicon, or it is not valid.

    Example:
        >>> claims = claim_finder().find("Two red umbrellas lie on a bench, but there is no dog.")
        >>> [(claim.name, claim.count, claim.color) for claim in claims]
        [('umbrella', 'two', 'red'), ('bench', 'one', '')]
    """
    loaded = Lexicon.load(lexicon)
    return EnglishClaims(loaded) if loaded.match == "english" else WordingClaims(loaded)


class WordingClaims:
    """Find claims by the wordings of a lexicon as they are: the longest one at each position.

    After a word that the lexicon lists as ``negation`` or ``hypothetical``, the rest of the clause
    claims nothing; after one listed as ``conditional``, the rest of the sentence. A question
    claims nothing at all. Counts and colors are not read.
    """

    def __init__(self, lexicon: Lexicon) -> None:
        self._names = lexicon.names
        is_spaced = lexicon.match == "words"
        self._wordings = _one_of(sorted(lexicon.names), is_spaced)
        blocking = [*lexicon.listed("negation"), *lexicon.listed("hypothetical")]
        self._blocking = _one_of(blocking, is_spaced)
        self._conditional = _one_of(lexicon.listed("conditional"), is_spaced)

    def find(self, sentence: str) -> list[Claim]:
        """Return the distinct claims of a sentence in the order in which they appear."""
        if sentence.rstrip().endswith(("?", "？")):
            return []
        claims: dict[str, Claim] = {}
        asserted = self._conditional.split(sentence.lower(), maxsplit=1)[0]
        for clause in _CLAUSE_ENDS.split(asserted):
            for match in self._wordings.finditer(self._blocking.split(clause, maxsplit=1)[0]):
                if name := self._names[match[0]]:
                    claims.setdefault(name, Claim(name, match[0]))
        return list(claims.values())


def _one_of(wordings: Sequence[str], is_spaced: bool) -> re.Pattern[str]:
    """Compile a pattern of wordings, longest first; between spaces a wording is a whole word.

    Without wordings it matches nothing.
    """
    pattern = "|".join(map(re.escape, sorted(wordings, key=len, reverse=True))) or r"(?!)"
    return re.compile(rf"(?<!\w)(?:{pattern})(?!\w)" if is_spaced else pattern)
