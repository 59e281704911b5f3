"""Check rows against what the policy accepts, in threads.

The checks of different rows do not depend on each other; their results keep the order of the rows.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from PIL import Image

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_THREADS = 16
_AHEAD = 2
"""Items in progress or waiting per thread; each may hold a decoded image."""


class ModelCheck(Protocol):
    """Define what a model requires of its prompts, as :class:`csr_vlm.models.prompt_check.ProcessorCheck` does."""

    @property
    def placeholders(self) -> Sequence[str]:
        """Return the model's own placeholders, which are removed from texts."""
        ...

    def require(self, text: str, image: Image.Image, responses: Sequence[str] = ()) -> None:
        """Verify that the model can encode a prompt and its responses.

        Raises:
            csr_vlm.data.rows.BadRow: It cannot.
        """
        ...


def num_threads() -> int:
    """Return the number of threads that check rows: the cores of this process, up to a limit."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, MAX_THREADS)


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int = _AHEAD
) -> Generator[Result]:
    """Apply a function to items in threads; yield the results in the order of the items.

    Args:
        function: Function that several threads may call at once.
        items: Items, of which at most ``ahead * threads`` are read ahead.
        threads: Number of threads; with 1, everything happens in this thread and nothing is read ahead.
        ahead: Items in progress or waiting per thread.
    """
    if threads <= 1:
        yield from map(function, items)
        return
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= ahead * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
