"""How long work tells that it goes on; the command line draws it, tests keep it silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]
"""Called with the number of items finished since the last call.

It may also have ``set_total(total)``, for work whose size shows only once it began, and
``note(numbers)``, for what the work measures as it goes.
"""


class Reporter(Protocol):
    """Receives what a run has to say while it works."""

    def stage(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """Open a stage of ``total`` items; the context gives the function that counts them."""
        ...

    def say(self, text: str) -> None:
        """Tell one line."""
        ...


class Silent:
    """Says nothing."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Advance]:
        yield lambda done: None

    def say(self, text: str) -> None:
        pass
