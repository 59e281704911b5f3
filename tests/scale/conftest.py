"""Collect these tests, which take minutes, only on request (make test-scale)."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    requested = any("tests/scale" in str(argument) for argument in config.invocation_params.args)
    return None if requested else True
