"""Split items into batches, and sample them at even distances."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
PROMPTS_PER_FULL_BEAM = 2
"""Prompts in a search on a GPU for each full beam that the rows have room for. A beam is full at the start of a round
and nearly empty at its end: with one prompt each, half of the rows are live on average, with two nearly all."""


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of ``size`` items; the last list may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def evenly_spaced(items: Sequence[Item], limit: int) -> list[Item]:
    """Return at most ``limit`` items: the first one, and others at even distances.

    Example:
        >>> evenly_spaced("abcdef", 3)
        ['a', 'c', 'e']
    """
    num_items = min(limit, len(items))
    return [items[index * len(items) // num_items] for index in range(num_items)]
