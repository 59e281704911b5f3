"""Lets a CUDA build of torchvision be imported beside a CPU build of torch."""

from __future__ import annotations

import sys
import types


def without_compiled_torchvision() -> None:
    """Keep torchvision from registering operators that its CUDA build cannot find here.

    Processors use only what torchvision does in Python: resizing and normalising. Where its
    compiled operators load, as in a matching build, this changes nothing that they use.
    """
    name = "torchvision._meta_registrations"
    sys.modules.setdefault(name, types.ModuleType(name))
