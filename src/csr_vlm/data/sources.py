"""Find the sources of prompts and pairs, and the format of each.

:mod:`csr_vlm.data.formats` describes what a module of a format defines and how to add one.
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
    hadpo,
    huggingface,
    imagefolder,
    jsonl,
    llamafactory,
    llava,
    parquet,
    rlaifv,
    sentinel,
    swift,
    trl,
    webdataset,
)
from csr_vlm.data.images import SUFFIXES
from csr_vlm.data.rows import Rows, open_source_file

PROMPT_FORMATS: dict[str, ModuleType] = {
    "jsonl": jsonl,
    "llava": llava,
    "images": folder,
    "imagefolder": imagefolder,
    "parquet": parquet,
    "huggingface": huggingface,
    "webdataset": webdataset,
}
"""Module by name of ``data.format``."""
PAIR_FORMATS: dict[str, ModuleType] = {
    "trl": trl,
    "llava": llava,
    "llamafactory": llamafactory,
    "swift": swift,
    "rlaifv": rlaifv,
    "sentinel": sentinel,
}
"""Module by name of ``csr export --format``."""
PAIR_READERS: dict[str, ModuleType] = {**PAIR_FORMATS, "hadpo": hadpo}
"""Module by name of ``data.pairs_format``."""
_FORMAT_HINT = (
    "expected one of: JSON Lines, LLaVA or CSR JSON, Parquet, tar shards (WebDataset), a folder of images, an "
    "ImageFolder, a folder written by save_to_disk, a hub id OWNER/NAME; or set data.format"
)
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_SHARD_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_SHARDS = 1_000_000
_FORMAT_BY_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "llava",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class Source:
    """Hold one source of prompts or pairs, which is opened when its rows are read."""

    path: str
    format: str
    root: Path | None
    """Resolved folder that image paths are relative to; None for the hub."""
    rows: Callable[[], Rows]
    count: Callable[[], int]
    """Return the number of rows; 0 if counting requires reading everything."""


def open_source(path: str, format_name: str, split: str, image_root: str | None) -> Iterator[Source]:
    """Yield the sources that a path, a glob or a range of shards ``{000..012}`` refers to.

    Args:
        path: Path, glob, range or hub id.
        format_name: Key of :data:`PROMPT_FORMATS`, or auto.
        split: Split of a Hugging Face dataset.
        image_root: Folder of the images; by default the source's own folder. A folder of images ignores it.

    Raises:
        CsrError: The source does not exist, or its format is unknown.
    """
    for name in _expand(path):
        detected = detect_format(name) if format_name == "auto" else format_name
        options: tuple[Any, ...] = (name, split) if detected == "huggingface" else (Path(name),)
        module, local = PROMPT_FORMATS[detected], Path(name)
        if detected in ("images", "imagefolder") and not local.is_dir():
            raise CsrError(
                f"{name[:300]} is not a folder, which format {detected} requires", "set data.prompts or data.format"
            )
        yield Source(
            path=name,
            format=detected,
            # The images of a folder of images are in it, wherever a recipe's other images are.
            root=_image_root(local, image_root if detected != "images" else None),
            rows=partial(module.rows, *options),
            count=partial(module.count, *options),
        )


def require_source(path: str, format_name: str) -> None:
    """Verify in an instant that the first file of a source exists and has a known format; folders are not listed.

    Raises:
        CsrError: It does not, or has not.
    """
    first = _expand(path)[0]
    if format_name == "auto" and not os.path.isdir(first):  # noqa: PTH112 - Path.is_dir raises on some names
        detect_format(first)


def is_local(path: str) -> bool:
    """Return whether everything that a path, a glob or a range refers to is on this disk, not on the hub."""
    try:
        return all(Path(name).exists() for name in _expand(path))
    except CsrError:
        return False


def is_hub_id(name: str) -> bool:
    """Return whether a source can only be a dataset on the hub: OWNER/NAME, where there is no folder OWNER."""
    path = Path(name)
    return _HUB_ID.match(name) is not None and not path.exists() and not path.parent.is_dir() and not path.suffix


def detect_format(name: str) -> str:
    """Return the format of a source, by its content if that is conclusive, else by its name.

    Raises:
        CsrError: The source does not exist, or its format is unknown.
    """
    path = Path(name)
    if path.is_dir():
        return _folder_format(path)
    by_suffix = "webdataset" if webdataset.is_shard(path) else _FORMAT_BY_SUFFIX.get(path.suffix.lower())
    if not path.exists() and by_suffix is None:
        if _HUB_ID.match(name) and not path.parent.is_dir():
            return "huggingface"
        if not path.suffix and "\0" not in name and len(name) < 1000:
            raise CsrError(f"there is no file or folder {name} here", "set data.prompts; a hub id is OWNER/NAME")
    with open_source_file(path) as handle:
        head = handle.read(512)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise CsrError(f"{path} is in UTF-16, as PowerShell writes it", "save it as UTF-8")
    if head[257:262] == b"ustar":
        return "webdataset"
    first_character = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    by_content = {b"[": "llava", b"{": "jsonl"}.get(first_character)
    # Any value may be a line of JSON Lines, and a file named .json may hold JSON Lines.
    detected = "jsonl" if by_suffix == "jsonl" else by_content or by_suffix
    if by_suffix == "llava" and detected == "jsonl" and _is_one_object(head):
        detected = "llava"
    if detected is None:
        raise CsrError(f"{path} has an unknown format: it starts with {head[:16]!r}", _FORMAT_HINT)
    return detected


def _is_one_object(head: bytes) -> bool:
    """Return whether a file that starts with a brace is one object of objects, and not an object a line."""
    first, newline, _ = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    if newline:
        return first.strip() == b"{"
    return re.match(rb'\{\s*"[^"]*"\s*:\s*\{', first) is not None


def _image_root(source: Path, image_root: str | None) -> Path | None:
    if image_root is not None:
        return Path(image_root).resolve()
    if not source.exists():
        return None
    return (source if source.is_dir() else source.parent).resolve()


def _folder_format(path: Path) -> str:
    if huggingface.is_saved(path):
        return "huggingface"
    suffixes: set[str] = set()
    for file in folder.walk(path):
        if file.name in imagefolder.METADATA_NAMES:
            return "imagefolder"
        suffixes.add(".tar" if webdataset.is_shard(file) else file.suffix.lower())
    for candidates, detected in (((".tar",), "webdataset"), ((".parquet",), "parquet"), (SUFFIXES, "images")):
        if suffixes.intersection(candidates):
            return detected
    listed = ", ".join(sorted(child.name for child in islice(path.iterdir(), 5))) or "nothing"
    raise CsrError(f"the folder {path} has an unknown format: it holds {listed}", _FORMAT_HINT)


def _expand(path: str) -> list[str]:
    """Return the paths behind a glob or a range; a path that exists stands for itself."""
    if os.path.exists(path):  # noqa: PTH110 - Path.exists raises on names that are too long
        return [path]
    match = _SHARD_RANGE.search(path)
    if match is not None:
        first, last = match[1], match[2]
        numbers = range(int(first), int(last) + 1)
        if len(numbers) > _MAX_SHARDS:
            raise CsrError(f"{path} refers to more than {_MAX_SHARDS:,} files", "set data.prompts")
        return [path[: match.start()] + f"{n:0{len(first)}d}" + path[match.end() :] for n in numbers]
    if not any(character in path for character in "*?["):
        return [path]
    matches = sorted(glob(path, recursive=True))  # noqa: PTH207 - the pattern may be absolute
    if not matches:
        raise CsrError(f"no file matches {path}", "set data.prompts")
    return matches
