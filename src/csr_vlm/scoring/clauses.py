"""Split a sentence into pieces that fit a text encoder's token limit."""

from __future__ import annotations

import re
from collections.abc import Callable

_CLAUSE_BOUNDARY = re.compile(r"(?<=[,;:.!?—–])\s+|\s+(?=(?:and|but|or|while|which|with|where)\b)")
"""White space after punctuation, or before a word that opens a clause."""


def split_clauses(sentence: str, fits: Callable[[str], bool]) -> list[str]:
    """Split a sentence at clause boundaries into pieces that fit, each as long as possible, left to right.

    A clause that does not fit is split between words; a word that does not fit is a piece of its
    own. The pieces joined by spaces are the sentence with its white space collapsed.

    Example:
        >>> split_clauses("A dog runs, a cat sits, a bird sings.", lambda text: len(text.split()) <= 6)
        ['A dog runs, a cat sits,', 'a bird sings.']
    """
    units: list[str] = []
    for clause in _CLAUSE_BOUNDARY.split(" ".join(sentence.split())):
        units += [clause] if fits(clause) else _join_while_fitting(clause.split(), fits)
    return _join_while_fitting(units, fits)


def _join_while_fitting(units: list[str], fits: Callable[[str], bool]) -> list[str]:
    """Join neighbors as long as they fit together."""
    pieces: list[str] = []
    for unit in units:
        joined = f"{pieces[-1]} {unit}" if pieces else unit
        if pieces and fits(joined):
            pieces[-1] = joined
        else:
            pieces.append(unit)
    return pieces
