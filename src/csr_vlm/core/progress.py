"""Report progress: what a stage needs to say how far it is, whoever displays it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Counts the finished items of one stage."""

    def advance(self, number: int = 1) -> None:
        """Count items finished since the last call."""
        ...

    def set_total(self, total: int) -> None:
        """Set the number of items, for a stage whose size shows only after it began."""
        ...

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Show values that the work itself measures, such as the training loss."""
        ...


class Reporter(Protocol):
    """Receives progress and log lines from a run."""

    def stage(self, title: str, total: int) -> AbstractContextManager[Progress]:
        """Open a stage of ``total`` items; 0 where the number is not known."""
        ...

    def log(self, text: str) -> None:
        """Log one line."""
        ...


class SilentProgress:
    """Counts nothing."""

    def advance(self, number: int = 1) -> None:
        pass

    def set_total(self, total: int) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        pass


class Silent:
    """Shows nothing."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Progress]:
        yield SilentProgress()

    def log(self, text: str) -> None:
        pass
