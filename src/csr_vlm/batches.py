"""Cutting an iterable into batches, which the standard library does from Python 3.12 on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of ``size`` items, the last one shorter if need be."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
