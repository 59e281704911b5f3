"""A folder of images: each is asked the questions of data.questions, or one about everything."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from csr_vlm.data.formats.rows import Rows
from csr_vlm.data.images import SUFFIXES

QUESTION = "Describe this image in detail."
"""Asked where data.questions says nothing."""


def rows(path: Path) -> Rows:
    """Yield the images below a folder, in the order of their names; what starts with a dot is left out."""
    for file in files(path):
        if file.suffix.lower() in SUFFIXES:
            name = file.relative_to(path).as_posix()
            yield name, {"id": name, "image": name, "text": QUESTION}


def count(path: Path) -> int:
    return sum(1 for _ in rows(path))


def files(path: Path) -> Iterator[Path]:
    """Yield the files below a folder, sorted folder by folder, links to folders left alone."""
    for folder, names, found in os.walk(path):
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(found) if not name.startswith("."))
