"""What a process itself has taken, read from Linux.

``ru_maxrss`` will not do: it begins with the peak of whoever started the process.
"""

from __future__ import annotations

from pathlib import Path


def megabytes(field: str) -> float:
    """Return a field of ``/proc/self/status``: VmRSS is what is held now, VmHWM the most so far."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024
