import gc
import sys
from functools import cache
from pathlib import Path

import pytest
import typer.main
from hypothesis import settings

from tests.families.shim import without_compiled_torchvision

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
