"""Files that are either absent or whole.

What is written here is on the disk, not only in its cache, when the call returns: first the
content, then the name. So whatever is written after it, such as a stage's marker, is never
found without it, even after the power went out.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from csr_vlm.core.errors import CsrError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ERROR_NUMBER = re.compile(r"(?:errno |os error )(\d+)", re.IGNORECASE)
"""How Arrow and safetensors name the system's error in their messages."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary neighbour, flush it to disk, and rename it to ``path``.

    Raises:
        CsrError: The disk is full or fails; see :func:`disk_troubles`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_troubles(path, temporary):
            _make_directory(path.parent)
            write(temporary)
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(root: Path) -> None:
    """Delete what a killed process left half-written below ``root``; only its owner may call this."""
    for path in list(root.rglob(".*.tmp")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def replace_directory(directory: Path, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` write a temporary neighbour, flush it to disk, and put it in the directory's place.

    Raises:
        CsrError: The disk is full or fails; see :func:`disk_troubles`.
    """
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with disk_troubles(directory, temporary):
            _make_directory(directory.parent)
            fill(temporary)
            for path in (*temporary.rglob("*"), temporary):
                _sync(path)
            shutil.rmtree(directory, ignore_errors=True)
            temporary.replace(directory)
            _sync(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def disk_troubles(path: Path, temporary: Path | None = None, *, of_disk_only: bool = False) -> Iterator[None]:
    """Word what a full or failing disk does to the writing of ``path``.

    Args:
        temporary: Where it is being written, from which the room it takes is estimated.
        of_disk_only: Leave errors alone that may be about something else, such as a file that is not there.

    Raises:
        CsrError: A system error came up inside, raised as such or worded by a library.
    """
    try:
        yield
    except Exception as error:
        number = _system_error(error)
        # What is not there is a mistake of ours, not the disk's.
        if number in (None, errno.ENOENT) or (of_disk_only and number not in (*_FULL, errno.EIO, errno.EROFS)):
            raise
        if number not in _FULL:
            raise CsrError(
                f"{path} cannot be written: {os.strerror(number)}",
                "see to the disk, then run the same command again: nothing finished is lost",
            ) from None
        room = _bytes_below(temporary) + shutil.disk_usage(_existing(path)).free
        raise CsrError(
            f"the disk is full: {path} needs more than the {room / 1e6:,.1f} MB there were for it",
            "csr check says what a whole run takes; make room and run the same command again: nothing finished is lost",
        ) from None


def _system_error(error: Exception) -> int | None:
    if isinstance(error, CsrError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _ERROR_NUMBER.search(str(error))
    return int(found[1]) if found else None


def _bytes_below(path: Path | None) -> int:
    """Sum the sizes of a file, or of all files in a folder; 0 where there is nothing."""
    if path is None or not path.exists():
        return 0
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def _existing(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _make_directory(path: Path) -> None:
    """Create a folder and those above it, each one's name on the disk."""
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot flush folders; their names are on the server already.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)


def open_ordinary(path: str | Path) -> BufferedReader:
    """Open a file that ends: a pipe would block, and a device may go on for ever.

    Raises:
        OSError: It is not there, or no ordinary file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    raise OSError(errno.EINVAL, "no ordinary file")


def write_text(path: Path, text: str) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file of our own.

    Raises:
        CsrError: It is not there or damaged.
    """
    try:
        with open_ordinary(path) as handle:
            return json.loads(handle.read())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no JSON: {str(error)[:100]}"
        raise CsrError(
            f"{path} cannot be read: {reason}",
            "restore it; or delete it and run the same command again, which makes it anew",
        ) from None


class Document(dict[str, Any]):
    """A JSON object of our own, which names its file where something is missing."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        super().__init__(content)
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise CsrError(f"{self._path} lacks {key!r}", "restore it; or delete it and run the same command again")


def read_document(path: Path) -> Document:
    """Read a JSON file of our own that holds an object.

    Raises:
        CsrError: It is not there, damaged, or holds something else.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise CsrError(f"{path} holds no JSON object", "restore it; or delete it and run the same command again")
    return Document(path, found)


def write_checksummed(path: Path, content: dict[str, Any]) -> None:
    """Write an object with a digest of its own, so that a change is noticed."""
    write_json(path, {**content, "digest": _checksum(content)})


def read_checksummed(path: Path) -> Document:
    """Read an object that :func:`write_sealed` wrote; one without a digest is taken as it is.

    Raises:
        CsrError: It is not there, or not as it was written.
    """
    found = read_document(path)
    if found.pop("digest", None) not in (None, _checksum(found)):
        raise CsrError(
            f"{path} was changed after it was written",
            "restore it; or delete it and run the same command again, which does that stage anew",
        )
    return found


def _checksum(content: dict[str, Any]) -> str:
    return digest(json.loads(json.dumps(content)))


def keep_content(directory: Path, content: bytes, suffix: str = "") -> Path:
    """Keep bytes in a file named by their hash, so that keeping them again changes nothing."""
    name = hashlib.sha256(content).hexdigest()
    path = directory / name[:2] / f"{name}{suffix}"

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    if not path.exists():
        write_atomically(path, write)
    return path


def sha256_of(path: Path) -> str:
    """Hash a file in pieces.

    Raises:
        CsrError: It cannot be read.
    """
    try:
        with open_ordinary(path) as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise CsrError(f"{path} cannot be read: {error.strerror}", "put it back where it was") from None


def digest(value: Any) -> str:
    """Hash plain data by content: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
