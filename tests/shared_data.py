"""Locate the reference cases: in $CSR_SHARED_DATA, in the checkout's shared/data, or in shared/data beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _locate() -> Path:
    """Return the folder of the reference cases; the last candidate where none exists."""
    if folder := os.environ.get("CSR_SHARED_DATA"):
        return Path(folder)
    inside, beside = ROOT / "shared" / "data", ROOT.parent / "shared" / "data"
    return inside if inside.is_dir() else beside


SHARED = _locate()


def shared(name: str) -> Path:
    """Return the path of a reference file or folder; skip the test or module where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"no reference cases: {path} does not exist (set CSR_SHARED_DATA)", allow_module_level=True)
    return path
