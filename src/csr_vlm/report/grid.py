"""Plain tables of numbers, as the pages' ``grid`` macro writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    name: str
    cells: Sequence[tuple[str, str]]
    """(value, interval) of each column."""
    own: bool = False
    """Whether it is this project's own among published ones."""


@dataclass(frozen=True)
class Grid:
    title: str
    first: str
    """Heading of the rows' names."""
    columns: Sequence[str]
    rows: Sequence[Row]
    note: str = ""
