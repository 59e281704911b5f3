"""Write files that are either absent or complete.

When a write returns, its content and then its name are on the disk, not only in the cache. What
is written afterwards, such as a stage's marker, therefore never exists without it, even after a
power failure.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import psutil

from csr_vlm.core.errors import CsrError

_DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG}
_HOST = re.sub(r"[^A-Za-z0-9-]", "-", platform.node())
_ENDS_IN_SHA256 = re.compile(rb"[0-9a-f]{64}$")
_ERROR_NUMBER = re.compile(r"(?:errno |os error )(\d+)", re.IGNORECASE)
"""Matches the system's error number in messages of Arrow and safetensors."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to disk, and rename it.

    Raises:
        CsrError: The disk is full or fails; see :func:`disk_errors`.
    """
    temporary = _temporary(path)
    try:
        with disk_errors(path, temporary):
            _make_directory(path.parent)
            temporary.unlink(missing_ok=True)  # a link that waits there would be followed
            write(temporary)
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """Return where this process writes a file or folder first; two processes, on whatever machine, never share it."""
    return path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.tmp")


def _remove_stale(path: Path) -> None:
    """Delete what processes of this machine that no longer live left of a folder."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{_HOST}.*.tmp"):
        number = left.name.split(".")[-2]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(left, ignore_errors=True)


def _open_permissions(directory: Path) -> None:
    """Give files the permissions that the umask grants; some libraries write weights for their owner alone."""
    probe = directory / ".permissions.tmp"
    probe.touch(0o666)
    allowed = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(stat.S_IMODE(path.stat().st_mode) | allowed)


def remove_temporaries(root: Path) -> None:
    """Delete what a killed process left incomplete below ``root``; only the holder of its lock may call this."""
    for path in list(root.rglob(".*.tmp")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def replace_directory(directory: Path, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` write a temporary directory, flush it to disk, and replace ``directory`` with it.

    Raises:
        CsrError: The disk is full or fails; see :func:`disk_errors`.
    """
    temporary = _temporary(directory)
    shutil.rmtree(temporary, ignore_errors=True)
    _remove_stale(directory)
    try:
        with disk_errors(directory, temporary):
            _make_directory(directory.parent)
            fill(temporary)
            _open_permissions(temporary)
            flush_directory(temporary)
            shutil.rmtree(directory, ignore_errors=True)
            temporary.replace(directory)
            _sync(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def disk_errors(path: Path, temporary: Path | None = None, *, of_disk_only: bool = False) -> Iterator[None]:
    """Turn errors of a full or failing disk, raised while ``path`` is written, into explanations.

    Args:
        path: File or directory that is written.
        temporary: Where it is written first; its size counts as available space.
        of_disk_only: Pass on errors that can have another cause, such as a missing file.

    Raises:
        CsrError: A system error occurred, raised as such or reported in the message of a library.
    """
    try:
        yield
    except Exception as error:
        number = _system_error(error)
        # A missing file is a bug, not a failure of the disk.
        if number in (None, errno.ENOENT) or (of_disk_only and number not in {*_DISK_FULL, errno.EIO, errno.EROFS}):
            raise
        if number not in _DISK_FULL:
            raise CsrError(
                f"{path} cannot be written: {os.strerror(number)}",
                "fix the disk, then run the same command again: finished work is kept",
            ) from None
        available = _size_of(temporary) + shutil.disk_usage(_existing_parent(path)).free
        raise CsrError(
            f"the disk is full: {path} needs more than the {available / 1e6:,.1f} MB available",
            "csr check estimates the space of a whole run; free some and run the same command again: finished work is "
            "kept",
        ) from None


def _system_error(error: Exception) -> int | None:
    """Return the system's error number of an exception; None if it has none."""
    if isinstance(error, CsrError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    match = _ERROR_NUMBER.search(str(error))
    return int(match[1]) if match else None


def _size_of(path: Path | None) -> int:
    """Return the size of a file, or of all files in a directory, in bytes; 0 if it does not exist."""
    if path is None or not path.exists():
        return 0
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _make_directory(path: Path) -> None:
    """Create a directory and its parents, and flush their names to disk."""
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Flush a file's content, or a directory's names, to disk."""
    if os.name == "nt":  # cannot open directories, and flushes only files that are open for writing
        if path.is_dir():
            return
        flags = os.O_RDWR
    else:
        flags = os.O_RDONLY
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot flush directories; their names are on the server already.
        if not (path.is_dir() and error.errno in {errno.EINVAL, errno.ENOTSUP}):
            raise
    finally:
        os.close(handle)


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading; a pipe would block, and a device may never end.

    Raises:
        OSError: The file does not exist, or is not a regular file.
    """
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, os.O_RDONLY | flags)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    raise OSError(errno.EINVAL, "not a regular file")


def flush_directory(directory: Path) -> None:
    """Flush what a library wrote to a directory to disk."""
    for path in (*directory.rglob("*"), directory):
        _sync(path)


def write_array(path: Path, values: Any) -> None:
    """Write a NumPy array as an .npy file, atomically."""
    import numpy as np

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, values, allow_pickle=False)

    write_atomically(path, write)


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8", newline="\n")

    write_atomically(path, write)


def write_checksummed_text(path: Path, text: str) -> None:
    """Write a text, whose last line becomes a comment with the SHA-256 of the lines above, atomically."""
    write_text(path, f"{text}{_checksum_line(text.encode())}")


def _checksum_line(text: bytes) -> str:
    return f"# sha256 of the lines above: {hashlib.sha256(text).hexdigest()}\n"


def require_text_unchanged(path: Path, hint: str) -> None:
    """Verify a text that :func:`write_checksummed_text` wrote; one without that last line is not verified.

    Raises:
        CsrError: The file cannot be read, or was changed after it was written.
    """
    try:
        with open_regular(path) as handle:
            content = handle.read()
    except OSError as error:
        raise CsrError(f"{path} cannot be read: {error.strerror}", hint) from None
    above, newline, last = content.removesuffix(b"\n").rpartition(b"\n")
    # Damage in the line itself leaves one of its marks.
    is_checksum = last.startswith(b"#") or _ENDS_IN_SHA256.search(last)
    if is_checksum and content != above + newline + _checksum_line(above + newline).encode():
        raise CsrError(f"{path} was changed after it was written", f"{hint}; if you changed it, delete its last line")


def write_json(path: Path, value: Any) -> None:
    """Write plain data as JSON with sorted keys, atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file that this package wrote.

    Raises:
        CsrError: The file is missing or damaged.
    """
    try:
        with open_regular(path) as handle:
            return json.loads(handle.read())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"invalid JSON: {str(error)[:100]}"
        raise CsrError(
            f"{path} cannot be read: {reason}",
            "restore it; or delete it and run the same command again, which writes it again",
        ) from None


class Document(dict[str, Any]):
    """Hold a JSON object and name its file in the error for a missing key."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        super().__init__(content)
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise CsrError(f"{self._path} has no key {key!r}", "restore it; or delete it and run the same command again")


def read_document(path: Path) -> Document:
    """Read a JSON object that this package wrote.

    Raises:
        CsrError: The file is missing, damaged, or holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise CsrError(f"{path} is not a JSON object", "restore it; or delete it and run the same command again")
    return Document(path, content)


def write_checksummed(path: Path, content: dict[str, Any]) -> None:
    """Write an object with its digest, so that later changes are detected."""
    write_json(path, {**content, "digest": _checksum(content)})


def read_checksummed(path: Path, hint: str = "which repeats that stage") -> Document:
    """Read an object that :func:`write_checksummed` wrote; one without a digest is not verified.

    Args:
        path: File of the object.
        hint: What running the same command again does after the file was deleted.

    Raises:
        CsrError: The file is missing or damaged, or was changed after it was written.
    """
    document = read_document(path)
    if document.pop("digest", None) not in (None, _checksum(document)):
        raise CsrError(
            f"{path} was changed after it was written",
            f"restore it; or delete it and run the same command again, {hint}",
        )
    return document


def _checksum(content: dict[str, Any]) -> str:
    return digest(json.loads(json.dumps(content)))


def store_content(directory: Path, content: bytes, suffix: str = "") -> Path:
    """Store bytes in a file named by their SHA-256, unless it exists, and return its path."""
    name = hashlib.sha256(content).hexdigest()
    path = directory / name[:2] / f"{name}{suffix}"

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    if not path.exists():
        write_atomically(path, write)
    return path


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits.

    Raises:
        CsrError: The file cannot be read.
    """
    try:
        with open_regular(path) as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise CsrError(f"{path} cannot be read: {error.strerror}", "restore it") from None


def digest(value: Any) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
