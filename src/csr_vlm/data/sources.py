"""What files of prompts and of pairs look like, one module a format.

A module of prompts has ``rows`` and ``count``; a module of pairs has ``write`` and
``responses``, and its rows are read by whichever of the first kind its file is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from glob import glob
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from csr_vlm.core.errors import CsrError
from csr_vlm.data.formats import (
    folder,
    huggingface,
    imagefolder,
    jsonl,
    llamafactory,
    llava,
    parquet,
    rlaifv,
    swift,
    trl,
    webdataset,
)
from csr_vlm.data.formats.rows import Rows, open_file
from csr_vlm.data.images import SUFFIXES

PROMPT_FORMATS: dict[str, ModuleType] = {
    "jsonl": jsonl,
    "llava": llava,
    "images": folder,
    "imagefolder": imagefolder,
    "parquet": parquet,
    "huggingface": huggingface,
    "webdataset": webdataset,
}
PAIR_FORMATS: dict[str, ModuleType] = {
    "trl": trl,
    "llava": llava,
    "llamafactory": llamafactory,
    "swift": swift,
    "rlaifv": rlaifv,
}
_KNOWN = (
    "known are JSON Lines, LLaVA or CSR JSON, Parquet, tar shards (WebDataset), a folder of images, an ImageFolder, "
    "a folder of save_to_disk, and a hub id OWNER/NAME; data.format names one"
)
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_SHARDS = 1_000_000
_FILE_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "llava",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class Source:
    """A place that prompts or pairs come from, opened row by row."""

    path: str
    format: str
    root: Path | None
    """Folder that its image paths are relative to, resolved; None for the hub."""
    rows: Callable[[], Rows]
    count: Callable[[], int]
    """Number of rows; 0 where only reading all would tell."""


def open_source(path: str, form: str, split: str, image_root: str | None) -> Iterator[Source]:
    """Yield the sources that a path, a glob or a range of shards ``{000..012}`` names.

    Args:
        form: Name of a format, or auto.
        split: Of a Hugging Face data set.
        image_root: Instead of the folder that the source lies in; no matter for a folder of images.

    Raises:
        CsrError: There is nothing, or nothing of a known format.
    """
    for name in _expanded(path):
        found = recognise(name) if form == "auto" else form
        options: tuple[Any, ...] = (name, split) if found == "huggingface" else (Path(name),)
        module, local = PROMPT_FORMATS[found], Path(name)
        if found in ("images", "imagefolder") and not local.is_dir():
            raise CsrError(f"{name} is no folder, as format {found} needs", "set data.prompts or data.format")
        own = local if local.is_dir() else local.parent
        # The images of a folder lie in it, wherever a recipe's other images do.
        elsewhere = image_root if found != "images" else None
        root = Path(elsewhere) if elsewhere is not None else own if local.exists() else None
        yield Source(
            path=name,
            format=found,
            root=root.resolve() if root is not None else None,
            rows=partial(module.rows, *options),
            count=partial(module.count, *options),
        )


def is_here(path: str) -> bool:
    """Tell whether all that a path, a glob or a range names is on this disk; what is on the hub is not."""
    try:
        return all(Path(name).exists() for name in _expanded(path))
    except CsrError:
        return False


def recognise(name: str) -> str:
    """Name the format of a source by its content, and by its name where the content does not tell.

    Raises:
        CsrError: It is not there, or of no known format.
    """
    path = Path(name)
    if path.is_dir():
        return _folder_format(path)
    suffix = "webdataset" if webdataset.is_shard(path) else _FILE_SUFFIXES.get(path.suffix.lower())
    if not path.exists() and suffix is None and _HUB_ID.match(name):
        return "huggingface"
    with open_file(path) as handle:
        head = handle.read(512)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head[257:262] == b"ustar":
        return "webdataset"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    by_content = {b"[": "llava", b"{": "jsonl"}.get(start)
    # A line of a JSON Lines file may be anything; a file called .json may hold JSON Lines.
    found = "jsonl" if suffix == "jsonl" else by_content or suffix
    if found is None:
        raise CsrError(f"{path} is of no known format: it starts with {head[:16]!r}", _KNOWN)
    return found


def _folder_format(path: Path) -> str:
    if huggingface.saved(path):
        return "huggingface"
    seen: set[str] = set()
    for file in folder.files(path):
        if file.name in imagefolder.NAMES:
            return "imagefolder"
        seen.add(".tar" if webdataset.is_shard(file) else file.suffix.lower())
    for suffixes, found in (((".tar",), "webdataset"), ((".parquet",), "parquet"), (SUFFIXES, "images")):
        if seen.intersection(suffixes):
            return found
    listed = ", ".join(sorted(entry.name for entry in islice(path.iterdir(), 5))) or "nothing"
    raise CsrError(f"the folder {path} is of no known format: it holds {listed}", _KNOWN)


def _expanded(path: str) -> list[str]:
    """Name the sources behind a glob or a range; one that is there is itself."""
    if os.path.exists(path):  # noqa: PTH110 - Path.exists raises on names that are too long
        return [path]
    matched = _RANGE.search(path)
    if matched is not None:
        first, last = matched[1], matched[2]
        numbers = range(int(first), int(last) + 1)
        if len(numbers) > _MOST_SHARDS:
            raise CsrError(f"{path} names more than {_MOST_SHARDS:,} files", "set data.prompts")
        return [path[: matched.start()] + f"{n:0{len(first)}d}" + path[matched.end() :] for n in numbers]
    if not any(sign in path for sign in "*?["):
        return [path]
    found = sorted(glob(path, recursive=True))  # noqa: PTH207 - the pattern may be absolute
    if not found:
        raise CsrError(f"nothing matches {path}", "set data.prompts")
    return found
