"""Define how a stage reports its progress, whatever displays it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Count the finished items of one stage."""

    def advance(self, number: int = 1) -> None:
        """Add items that were finished since the last call."""
        ...

    def set_total(self, total: int) -> None:
        """Set the number of items of a stage whose size becomes known only after it began."""
        ...

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Show values that the stage measures itself, such as the training loss."""
        ...


class Reporter(Protocol):
    """Receive progress and log lines from a run."""

    def stage(self, title: str, total: int) -> AbstractContextManager[Progress]:
        """Open a stage of ``total`` items; 0 if the number is unknown."""
        ...

    def log(self, text: str) -> None:
        """Log one line."""
        ...


class SilentProgress:
    """Ignore all progress."""

    def advance(self, number: int = 1) -> None:
        pass

    def set_total(self, total: int) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        pass


class Silent:
    """Display nothing."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Progress]:
        yield SilentProgress()

    def log(self, text: str) -> None:
        pass
