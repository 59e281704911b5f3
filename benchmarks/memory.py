"""Read the memory use of this process from Linux.

``ru_maxrss`` is not suitable: it starts at the peak of the parent process.
"""

from __future__ import annotations

from pathlib import Path


def megabytes(field: str) -> float:
    """Return a field of ``/proc/self/status`` in MB: VmRSS is the current memory, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024
