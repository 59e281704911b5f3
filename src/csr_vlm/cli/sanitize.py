"""Text from models and files, made safe to print."""

from __future__ import annotations

import re

_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Show what would move the cursor, turn the text round or not encode by its code.

    Example:
        >>> printable("a\x1b[2Jb")
        'a\\x1b[2Jb'
    """
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: str) -> str:
    r"""Do the same and put a space for every run of white space.

    Example:
        >>> one_line("a\x1b[2Jb\n c ")
        'a\\x1b[2Jb c'
    """
    return printable(" ".join(text.split()))
