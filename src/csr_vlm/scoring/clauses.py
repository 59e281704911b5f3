"""Cutting a sentence into pieces that a text tower can read."""

from __future__ import annotations

import re
from collections.abc import Callable

_CLAUSE = re.compile(r"(?<=[,;:.!?—–])\s+|\s+(?=(?:and|but|or|while|which|with|where)\b)")
"""White space after punctuation, or before a word that opens a clause."""


def clauses(sentence: str, fits: Callable[[str], bool]) -> list[str]:
    """Cut a sentence at clause boundaries into pieces that fit, each as long as it may be, left to right.

    A clause that does not fit is cut between words; a word that does not fit stands alone.
    The pieces joined by spaces are the sentence, its white space made single.
    """
    units: list[str] = []
    for clause in _CLAUSE.split(" ".join(sentence.split())):
        units += [clause] if fits(clause) else _packed(clause.split(), fits)
    return _packed(units, fits)


def _packed(units: list[str], fits: Callable[[str], bool]) -> list[str]:
    """Join neighbours as long as they fit together."""
    pieces: list[str] = []
    for unit in units:
        joined = f"{pieces[-1]} {unit}" if pieces else unit
        if pieces and fits(joined):
            pieces[-1] = joined
        else:
            pieces.append(unit)
    return pieces
