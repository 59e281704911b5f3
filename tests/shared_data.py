"""Where the reference cases lie: ../shared/data beside the checkout, or $CSR_SHARED_DATA."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("CSR_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


def shared(name: str) -> Path:
    """Return the path of a shared file or folder; skip the test or module without it."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"no reference cases: {path} is absent (set CSR_SHARED_DATA)", allow_module_level=True)
    return path
