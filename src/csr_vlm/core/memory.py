"""Free the memory of finished stages before the next one loads its models."""

from __future__ import annotations

import gc
import sys


def free_memory() -> None:
    """Free what a finished stage leaves to the garbage collector, and the memory that torch caches on the GPU.

    Replaced methods, hooks and tracebacks refer to their model, so it is freed only by a collection.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
