"""Read Hugging Face datasets: a folder written by save_to_disk, or a hub id or local copy of a hub repository.

The latter are streamed. ``datasets`` is imported only when a dataset is opened. Images stay encoded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from csr_vlm.core.errors import CsrError, reason_of
from csr_vlm.core.hub import require_reachable
from csr_vlm.data.rows import FIELDS, BadRow, Rows

SAVED_FILES = ("dataset_dict.json", "state.json")
"""Files that identify a folder of save_to_disk."""


def rows(source: str, split: str) -> Rows:
    """Yield the rows of one split.

    Raises:
        CsrError: The dataset or the split does not exist, or reading fails midway.
    """
    name, number = Path(source).name, 0
    dataset = _open(source, split)
    try:
        for number, row in enumerate(dataset, start=1):
            yield f"{name} row {number}", {"__key__": f"{name}-{number}", **row}
    except Exception as error:  # Anything that the network or a damaged file may raise.
        if isinstance(error, BadRow | CsrError):
            raise
        raise CsrError(
            f"reading the dataset {source} failed after row {number}: {reason_of(error)}", "try again"
        ) from None


def count(source: str, split: str) -> int:
    """Count the rows of a saved dataset; return 0 for a streamed one, whose size may be unknown."""
    return len(_open(source, split)) if is_saved(Path(source)) else 0


def is_saved(path: Path) -> bool:
    """Return whether a folder was written by save_to_disk."""
    return any((path / name).is_file() for name in SAVED_FILES)


def keep_images_encoded(dataset: Any) -> Any:
    """Make every image column yield encoded bytes instead of a decoded image."""
    from datasets import Image, List

    for name, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            dataset = dataset.cast_column(name, List(Image(decode=False)))
    return dataset


def _open(source: str, split: str) -> Any:
    """Open one split with its images encoded.

    Raises:
        CsrError: The dataset or the split does not exist.
    """
    from datasets import load_dataset, load_from_disk

    if not os.path.exists(source):  # noqa: PTH110 - Path.exists raises on names that are too long
        require_reachable("data.prompts", source)
    try:
        if is_saved(Path(source)):
            dataset = load_from_disk(source)
            dataset = _select_split(source, dataset, split) if isinstance(dataset, dict) else dataset
        else:
            dataset = load_dataset(source, split=split, streaming=True)
            dataset = dataset._resolve_features() if dataset.features is None else dataset
    except CsrError:
        raise
    except Exception as error:  # Anything that the hub, the network or a damaged file may raise.
        missing = "" if os.path.exists(source) else f"there is no folder {source} here; "  # noqa: PTH110
        raise CsrError(
            f"the dataset {source} cannot be opened: {reason_of(error)}",
            f"{missing}give a folder written by save_to_disk, or a hub id OWNER/NAME and data.split",
        ) from None
    return keep_images_encoded(dataset.select_columns([name for name in dataset.column_names if name in FIELDS]))


def _select_split(source: str, splits: dict[str, Any], split: str) -> Any:
    if split not in splits:
        raise CsrError(
            f"the dataset {source} has no split {split!r}",
            f"set data.split; expected one of: {', '.join(sorted(splits))}",
        )
    return splits[split]
