"""What went wrong, in three lines: what, why, and what to do. A traceback comes only with ``--debug``."""

from __future__ import annotations

import errno
import re
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csr_vlm.cli import console
from csr_vlm.core.errors import CsrError

EXTRAS = {
    "open_clip": "openclip",
    "lmms_eval": "eval",
    "torchvision": "families",
    "num2words": "families",
    "vllm": "vllm",
    "ray": "ray",
}
"""Which extra of csr-vlm installs an optional module."""
_ERRNO = re.compile(r"\[Errno \d+\] (.*?)(: '.*')?$")
"""How Python words what the operating system refused; the number says nothing to anybody."""
_HINTS = {
    errno.EACCES: "choose another place with --out, or change its permissions",
    errno.EROFS: "choose a place that can be written to with --out",
    errno.ENOSPC: "free some space and run the same command again: it goes on where it stopped",
    errno.EDQUOT: "free some space and run the same command again: it goes on where it stopped",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of that path is a file; check it",
    errno.EISDIR: "that is a folder; name a file in it",
}


@dataclass(frozen=True)
class Explained:
    """An error for people."""

    what: str
    why: str = ""
    hint: str = ""
    ours: bool = False
    """Whether the program is to blame rather than what it was given."""


def explain(error: BaseException) -> Explained:
    """Put an exception into words."""
    if isinstance(error, CsrError):
        return _of_user(error)
    if hasattr(error, "format_message"):  # typer keeps the class of what is wrong with a command line to itself
        return _of_usage(error, error.format_message())
    if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get((error.name or "").partition(".")[0])):
        return Explained(
            f"this needs {error.name}", "it is not installed", f"pip install 'csr-vlm[{extra}]', or pip install it"
        )
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        where = f"{error.filename}" if error.filename else "a file"
        return Explained(f"{where} cannot be used", error.strerror.lower(), _HINTS.get(error.errno, ""))
    if type(error).__name__ == "OutOfMemoryError":
        return Explained(
            "the GPU's memory is full",
            str(error).partition(". ")[0],
            "lower generation.max_rows for the search, training.trl.per_device_train_batch_size for training",
        )
    if isinstance(error, MemoryError):
        return Explained("the machine's memory is full", "", "lower generation.max_rows or generation.prompts_per_part")
    said = str(error).strip().splitlines() or [""]
    return Explained(f"{type(error).__name__}, which should not happen", said[0], ours=True)


def reporter(error: BaseException) -> None:
    """Print an error to stderr; what should not happen leaves its traceback in a file."""
    if console.mode.debug:
        traceback.print_exception(error)
    if type(error).__name__ == "NoArgsIsHelpError":  # a group without a verb
        print(error.format_message(), file=sys.stderr)  # type: ignore[attr-defined]
        return
    found = explain(error)
    hint = found.hint
    if found.ours:
        hint = "please report it with what --debug shows"
        if not console.mode.debug:
            hint = f"please report it with the traceback in {_kept(error)}"
    for name, text in (("error", found.what), ("why", found.why), ("hint", hint)):
        if text:
            print(f"{name}: {text}", file=sys.stderr)


def _of_user(error: CsrError) -> Explained:
    what, why = _divided(error.message)
    return Explained(what, _ERRNO.sub(r"\1", why), error.hint)


def _divided(message: str) -> tuple[str, str]:
    """Divide "what went wrong: why" into its two lines."""
    what, colon, why = message.partition(": ")
    return (what, why) if colon and " " in what else (message, "")  # a path or an option names where, not what


def _of_usage(error: Any, message: str) -> Explained:
    """Word what is wrong with a command line."""
    said, *meant = re.split(r"Did you mean |\(Possible options: ", message.strip())
    verb = error.ctx.command_path if getattr(error, "ctx", None) else "csr"
    likely = "".join(meant).strip(" ?')").replace(", ", " or ")
    hint = f"did you mean {likely}?" if likely else f"{verb} --help says what it takes"
    what, why = _divided(said[:1].lower() + said[1:].strip().rstrip(".").replace("option: ", "option "))
    why = why.removeprefix("Value error, ")
    return Explained(what, why[:1].lower() + why[1:], hint)


def exit_code(error: BaseException) -> int:
    """2 for a command line that cannot be read, 1 for everything else."""
    return int(getattr(error, "exit_code", 1))


def _kept(error: BaseException) -> Path:
    with tempfile.NamedTemporaryFile(
        "w", prefix="csr-error-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
    ) as file:
        file.write("".join(traceback.format_exception(error)))
    return Path(file.name)
