"""Measure what a stage costs, and free its memory before the next one loads its models."""

from __future__ import annotations

import gc
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

COSTS = ("seconds", "memory_gb", "gpu_memory_gb")
"""What :meth:`CostMeter.dump` measures; the last one on a GPU only."""
_PROCESS = Path("/proc/self")


def available_memory(device: Any) -> int | None:
    """Return the bytes of a GPU that new tensors can use, those that torch caches included; None for other devices."""
    import torch

    if torch.device(device).type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def total_memory(device: Any) -> int:
    """Return the bytes of a GPU."""
    import torch

    return int(torch.cuda.mem_get_info(device)[1])


def free_memory() -> None:
    """Free what a finished stage leaves to the garbage collector, and the memory that torch caches on the GPU.

    Replaced methods, hooks and tracebacks refer to their model, so it is freed only by a collection.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


class CostMeter:
    """Measure the time, and the peak memory of this process, from the construction on."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        with suppress(OSError):  # the peak is then that of the process so far, or unknown
            (_PROCESS / "clear_refs").write_text("5", encoding="ascii")
        if (cuda := _cuda()) is not None:
            cuda.reset_peak_memory_stats()

    def dump(self) -> dict[str, float]:
        """Return seconds and, where the system tells them, GB of memory and of the fullest GPU."""
        costs = {"seconds": round(time.perf_counter() - self._started, 2)}
        if (peak := _peak_bytes()) is not None:
            costs["memory_gb"] = round(peak / 1e9, 3)
        if (cuda := _cuda()) is not None:
            allocated = max(cuda.max_memory_allocated(device) for device in range(cuda.device_count()))
            costs["gpu_memory_gb"] = round(allocated / 1e9, 3)
        return costs


def _peak_bytes() -> int | None:
    """Return the peak of the resident memory; None on systems other than Linux."""
    try:
        lines = (_PROCESS / "status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def _cuda() -> Any:
    """Return torch's CUDA module if it is in use, else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
