"""Read a folder of images; each image gets the questions of data.questions, or a request to describe it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from csr_vlm.data.images import SUFFIXES
from csr_vlm.data.rows import Rows

QUESTION = "Describe this image in detail."
"""Question if data.questions is empty."""


def rows(path: Path) -> Rows:
    """Yield the images below a folder in the order of their names, without hidden files."""
    for file in walk(path):
        if file.suffix.lower() in SUFFIXES:
            name = file.relative_to(path).as_posix()
            yield name, {"id": name, "image": name, "text": QUESTION}


def count(path: Path) -> int:
    """Count the images below a folder."""
    return sum(1 for _ in rows(path))


def walk(path: Path) -> Iterator[Path]:
    """Yield the files below a folder, sorted folder by folder; do not follow links to folders."""
    for folder, subfolders, files in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))
