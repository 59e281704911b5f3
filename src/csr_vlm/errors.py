"""The one exception a user is meant to see."""

from __future__ import annotations


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
