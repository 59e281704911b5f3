"""Define a case of bad input: a maker of files, and what must come of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_PIXELS = 1_000_000
"""Pixels of the largest image that the readers accept in these tests."""


@dataclass(frozen=True)
class WrittenCase:
    """Describe the files that a case wrote to its folder."""

    reader: str
    """Name of a function of :mod:`tests.faults.reading`."""
    target: str
    rows: int | None = None
    """Number of rows that must be accepted or dropped in total; None if it is unknown."""
    expected: str | None = None
    """``accepted`` or ``rejected`` if only one of them is correct."""
    settings: dict[str, Any] = field(default_factory=dict)


Maker = Callable[[Path, random.Random], WrittenCase]


@dataclass(frozen=True)
class Case:
    name: str
    seed: str
    maker: Maker

    def write(self, folder: Path) -> WrittenCase:
        return self.maker(folder, random.Random(self.seed))
