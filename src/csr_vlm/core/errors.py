"""The one exception a user is meant to see, and how its hints are worded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CsrError(Exception):
    """Something went wrong that the user can mend.

    The command line prints ``message`` and ``hint`` and no traceback; a library caller
    gets an ordinary exception.

    Args:
        message: What went wrong and why, in one sentence.
        hint: What to do about it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message if not hint else f"{message} ({hint})")
        self.message = message
        self.hint = hint


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def nearest(name: str, known: Iterable[str], *, say_all: bool = True) -> str:
    """Word what may have been meant; where nothing is near, all there is, if that is few."""
    options = sorted(known)
    near = difflib.get_close_matches(name, options, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(options)}" if say_all else "leave it out"
