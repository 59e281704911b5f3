"""These take minutes: they are collected only where they are asked for (make test-scale)."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    asked = any("tests/scale" in str(argument) for argument in config.invocation_params.args)
    return None if asked else True
