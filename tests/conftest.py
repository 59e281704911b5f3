import sys
from pathlib import Path

from hypothesis import settings

from tests.families.shim import without_compiled_torchvision

settings.register_profile("repeatable", deadline=None, max_examples=50, derandomize=True, database=None)
settings.load_profile("repeatable")
sys.path.append(str(Path(sys.prefix) / "only-for-tests"))
without_compiled_torchvision()
