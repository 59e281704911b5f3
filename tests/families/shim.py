"""Make a CUDA build of torchvision importable with a CPU build of torch."""

from __future__ import annotations

import sys
import types


def without_compiled_torchvision() -> None:
    """Prevent torchvision from registering compiled operators, which its CUDA build cannot load here.

    Processors use only torchvision's Python code, for resizing and normalizing, so this does not
    affect them.
    """
    name = "torchvision._meta_registrations"
    sys.modules.setdefault(name, types.ModuleType(name))
