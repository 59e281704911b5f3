"""Define the one exception that is shown to users, and word its hints."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CsrError(Exception):
    """Report a problem that the user can fix.

    The command line prints ``message`` and ``hint`` without a traceback; library callers get
    an ordinary exception.

    Args:
        message: What went wrong and why, in one sentence.
        hint: What to do about it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message if not hint else f"{message} ({hint})")
        self.message = message
        self.hint = hint


class PromptError(CsrError):
    """Report a problem with one prompt; a search drops the prompt and goes on."""


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def suggestion(name: str, options: Iterable[str], *, list_options: bool = True) -> str:
    """Format a hint for a misspelled name: the closest option, or all of them if none is close.

    Args:
        name: What the user wrote.
        options: The valid names.
        list_options: List the options if none is close; pass False where there are too many.

    Example:
        >>> suggestion("papr", ["official", "paper"])
        'did you mean paper?'
        >>> suggestion("x", ["official", "paper"])
        'expected one of: official, paper'
    """
    known = sorted(options)
    if close := difflib.get_close_matches(name, known, n=1):
        return f"did you mean {close[0]}?"
    return f"expected one of: {', '.join(known)}" if list_options else "leave it out"
