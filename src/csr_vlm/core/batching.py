"""Cutting items into batches, and taking some of them evenly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of ``size`` items, the last one shorter if need be."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def evenly_spaced(items: Sequence[Item], most: int) -> list[Item]:
    """Take at most so many items, the first among them and the rest at even distances.

    Example:
        >>> evenly_spaced("abcdef", 3)
        ['a', 'c', 'e']
    """
    number = min(most, len(items))
    return [items[place * len(items) // number] for place in range(number)]
