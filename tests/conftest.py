from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import typer.main
from hypothesis import settings

from tests.families.shim import without_compiled_torchvision

if TYPE_CHECKING:
    from playwright.sync_api import Browser

settings.register_profile("repeatable", deadline=None, max_examples=50, derandomize=True, database=None)
settings.load_profile("repeatable")
sys.path.append(str(Path(sys.prefix) / "only-for-tests"))
without_compiled_torchvision()
# Typer builds its command in every call, which takes a third of a second.
typer.main.get_command = cache(typer.main.get_command)


@pytest.fixture(scope="module", autouse=True)
def _short_collections() -> None:
    """Keep what earlier modules left out of garbage collections: every stage of a run ends with one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Open the system's Chromium, once a process: Playwright refuses a second driver beside the first."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("chromium is not installed")
    # Chromium's sandbox does not start as root, the usual user in a container.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=arguments)
        yield opened
        opened.close()
