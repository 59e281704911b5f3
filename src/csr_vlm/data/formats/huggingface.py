"""Hugging Face data sets: a folder that save_to_disk wrote; a hub id or a copy of its folder, streamed.

``datasets`` is imported when one is opened and not before. Images stay encoded.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from csr_vlm.core.errors import CsrError, reason_of
from csr_vlm.data.formats.rows import FIELDS, BadRow, Rows

MARKS = ("dataset_dict.json", "state.json")
"""Files by which a folder of save_to_disk is known."""


def rows(source: str, split: str) -> Rows:
    name, number = Path(source).name, 0
    opened = _open(source, split)
    try:
        for number, row in enumerate(opened, start=1):
            yield f"{name} row {number}", {"__key__": f"{name}-{number}", **row}
    except Exception as error:  # Whatever the network or a damaged file raise.
        if isinstance(error, BadRow | CsrError):
            raise
        raise CsrError(
            f"the data set {source} breaks off after row {number}: {reason_of(error)}", "try again"
        ) from None


def count(source: str, split: str) -> int:
    """Count the rows of a saved data set; 0 for a streamed one, which need not say."""
    return len(_open(source, split)) if saved(Path(source)) else 0


def saved(path: Path) -> bool:
    """Tell whether save_to_disk wrote a folder."""
    return any((path / mark).is_file() for mark in MARKS)


def _open(source: str, split: str) -> Any:
    """Open one split with images undecoded.

    Raises:
        CsrError: There is no such data set or split.
    """
    from datasets import load_dataset, load_from_disk

    try:
        if saved(Path(source)):
            found = load_from_disk(source)
            found = _split(source, found, split) if isinstance(found, dict) else found
        else:
            found = load_dataset(source, split=split, streaming=True)
            found = found._resolve_features() if found.features is None else found
    except CsrError:
        raise
    except Exception as error:  # Whatever the hub, the network or a damaged file raise.
        raise CsrError(
            f"the data set {source} cannot be opened: {reason_of(error)}",
            "give a folder of save_to_disk, or a hub id OWNER/NAME and data.split",
        ) from None
    return undecoded(found.select_columns([name for name in found.column_names if name in FIELDS]))


def _split(source: str, found: dict[str, Any], split: str) -> Any:
    if split not in found:
        raise CsrError(f"the data set {source} has no split {split!r}", f"set data.split; it has {_listed(found)}")
    return found[split]


def undecoded(found: Any) -> Any:
    """Let every image column yield its bytes instead of a decoded picture."""
    from datasets import Image, List

    for name, feature in found.features.items():
        if isinstance(feature, Image):
            found = found.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            found = found.cast_column(name, List(Image(decode=False)))
    return found


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
