"""Make text from models and files safe to print."""

from __future__ import annotations

import re

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Escape control characters, bidirectional marks and surrogates.

    Example:
        >>> printable("a\x1b[2Jb")
        'a\\x1b[2Jb'
    """
    return _CONTROL_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: str) -> str:
    r"""Escape like :func:`printable`, and replace every run of white space by a space.

    Example:
        >>> one_line("a\x1b[2Jb\n c ")
        'a\\x1b[2Jb c'
    """
    return printable(" ".join(text.split()))
