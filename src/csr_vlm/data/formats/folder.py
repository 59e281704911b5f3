"""Read a folder of images; each image gets the questions of data.questions, or a request to describe it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from csr_vlm.data.images import SUFFIXES, UNREAD_SUFFIXES
from csr_vlm.data.rows import BadRow, Rows

_PROMPT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_PROMPTS_HINT = "if it holds the prompts, set data.prompts to this file"
QUESTION = "Describe this image in detail."
"""Question if data.questions is empty."""


def rows(path: Path) -> Rows:
    """Yield the images below a folder in the order of their names, without hidden files.

    Pictures and videos in formats that are not read, and files of prompts, yield a reason; other files yield nothing.
    """
    for file in walk(path):
        if file.suffix.lower() in SUFFIXES:
            name = file.relative_to(path).as_posix()
            yield name, {"id": name, "image": name, "text": QUESTION}
        elif file.suffix.lower() in UNREAD_SUFFIXES:
            yield file.name, BadRow(f"a format that is not read ({file.suffix.lower()})")
        elif file.suffix.lower() in _PROMPT_SUFFIXES:
            yield file.name, BadRow(f"a file in a folder of images ({file.suffix.lower()})", _PROMPTS_HINT)


def count(path: Path) -> int:
    """Count the images below a folder."""
    return sum(1 for _ in rows(path))


def walk(path: Path) -> Iterator[Path]:
    """Yield the files below a folder, sorted folder by folder; follow links, but into no folder twice."""
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))
