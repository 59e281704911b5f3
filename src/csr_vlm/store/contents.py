"""Record what a stage wrote, so that its next user notices a change.

A marker lists every file of its stage by its path in the run, with its SHA-256 and, for a table, its
number of rows. Parquet's own page checksums name damage while a stage is not finished yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from csr_vlm.core.errors import CsrError
from csr_vlm.store import files, tables

Contents = Mapping[str, Mapping[str, Any]]
"""Path relative to the run -> ``sha256`` and, for a table, ``rows``."""


def record(root: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return the contents of files below ``root``."""
    return {path.relative_to(root).as_posix(): _describe(path) for path in paths}


def verify(root: Path, contents: Contents, hint: str) -> None:
    """Verify that files are those that were recorded.

    Args:
        root: Folder that the paths are relative to.
        contents: What :func:`record` returned.
        hint: What to do about a file that is not.

    Raises:
        CsrError: A file is missing or was changed.
    """
    for name, recorded in contents.items():
        path = root / name
        held = f"; it held {recorded['rows']} rows" if "rows" in recorded else ""
        if not path.is_file():
            raise CsrError(f"{path} is missing{held}", hint)
        if files.sha256_of(path) != recorded["sha256"]:
            raise CsrError(f"{path} was changed after it was written{held}", hint)


def _describe(path: Path) -> dict[str, Any]:
    rows = {"rows": tables.count_rows(path)} if path.suffix == ".parquet" else {}
    return {"sha256": files.sha256_of(path), **rows}
