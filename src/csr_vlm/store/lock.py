"""Lock a run directory against a second process.

The lock is the operating system's lock on the file ``RUN/.lock`` (flock on POSIX, LockFileEx on
Windows), so it is released however the process ends. ``RUN/.lock.json`` names the process that
holds it, for the error message of a second one.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from csr_vlm.core.errors import CsrError
from csr_vlm.store import files

_ACQUIRE_SECONDS = 0.5
"""How long to retry: another process may hold the lock for an instant, only to check it."""
_CHECK_SECONDS = 0.03
"""How long to retry a check: two processes may check at the same instant."""
_POLL_SECONDS = 0.01


@contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Hold the lock of a run directory.

    Raises:
        CsrError: Another process holds the lock, or its file cannot be written.
    """
    lock = _lock(directory)
    try:
        with files.disk_errors(_lock_path(directory)):
            lock.acquire(timeout=_ACQUIRE_SECONDS, poll_interval=_POLL_SECONDS)
    except Timeout:
        raise CsrError(
            f"{directory} is in use by another process{_describe_holder(directory)}",
            "wait until it ends, or stop it",
        ) from None
    try:
        _write_holder(directory)
        yield
    finally:
        with contextlib.suppress(OSError):
            _holder_path(directory).unlink(missing_ok=True)
        lock.release()


def is_locked(directory: Path) -> bool:
    """Return whether a process holds the lock of a run directory; a free lock is taken for an instant.

    Raises:
        CsrError: The lock's file is a symbolic link.
        PermissionError: The lock's file cannot be opened for writing.
    """
    if not _lock_path(directory).exists():
        return False
    try:
        with _lock(directory).acquire(timeout=_CHECK_SECONDS, poll_interval=_POLL_SECONDS):
            return False
    except Timeout:
        return True


def _lock(directory: Path) -> FileLock:
    path = _lock_path(directory)
    if path.is_symlink():  # older versions of filelock follow the link and truncate its target
        raise CsrError(f"{path} is a symbolic link", "delete it")
    # Not thread-local: a lock may be released by another thread than the one that acquired it.
    return FileLock(path, thread_local=False)


def _lock_path(directory: Path) -> Path:
    return directory / ".lock"


def _holder_path(directory: Path) -> Path:
    return directory / ".lock.json"


def _write_holder(directory: Path) -> None:
    # Only a message depends on it: a full disk is reported by the work itself.
    with contextlib.suppress(CsrError, OSError):
        holder = {"pid": os.getpid(), "host": platform.node(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        files.write_json(_holder_path(directory), holder)


def _describe_holder(directory: Path) -> str:
    """Return which process holds the lock, in parentheses; empty if it is unknown."""
    try:
        holder = files.read_document(_holder_path(directory))
        return f" (process {holder['pid']} on {holder['host']}, since {holder['started']})"
    except CsrError:
        return ""
