"""Represent a table of numbers, which the ``number_table`` macro renders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TableRow:
    """Represent one row."""

    name: str
    cells: Sequence[tuple[str, str]]
    """(value, interval) per column; an empty interval is not shown."""
    highlighted: bool = False
    """Whether the row has this project's numbers among published ones."""
    detail: str = ""
    """Written below the name."""


@dataclass(frozen=True)
class NumberTable:
    """Represent a table with one named row per model, policy or setting."""

    title: str
    row_heading: str
    columns: Sequence[str]
    rows: Sequence[TableRow]
    note: str = ""
