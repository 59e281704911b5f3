"""Print errors in three lines: what went wrong, why, and what to do; ``--debug`` adds the traceback."""

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
from csr_vlm.core.installing import install_command
from csr_vlm.core.secrets import redact

EXTRAS = {
    "open_clip": "openclip",
    "lmms_eval": "eval",
    "torchvision": "families",
    "num2words": "families",
    "vllm": "vllm",
    "ray": "ray",
    "gradio": "app",
}
"""Extra of csr-vlm that installs an optional module."""
_ERRNO_PREFIX = re.compile(r"\[Errno \d+\] (.*?)(: '.*')?$")
"""Form of Python's messages for operating system errors."""
_HINTS = {
    errno.EACCES: "choose another directory with --out, or change its permissions",
    errno.EROFS: "choose a writable directory with --out",
    errno.ENOSPC: "free some space and rerun the same command: it resumes where it stopped",
    errno.EDQUOT: "free some space and rerun the same command: it resumes where it stopped",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path: a part of it is a file",
    errno.EISDIR: "give a file instead of a folder",
}


@dataclass(frozen=True)
class Explanation:
    """Represent an error for people."""

    what: str
    why: str = ""
    hint: str = ""
    is_bug: bool = False
    """True if the program is at fault rather than its input."""


def explain(error: BaseException) -> Explanation:
    """Describe an exception for people."""
    if isinstance(error, CsrError):
        return _explain_csr_error(error)
    if hasattr(error, "format_message"):  # typer does not export the class of usage errors
        return _explain_usage_error(error, error.format_message())
    if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get((error.name or "").partition(".")[0])):
        return Explanation(f"{error.name} is required", "it is not installed", install_command(extra))
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        path = f"{error.filename}" if error.filename else "a file"
        return Explanation(f"{path} cannot be used", error.strerror.lower(), _HINTS.get(error.errno, ""))
    if type(error).__name__ == "OutOfMemoryError":
        return Explanation(
            "out of GPU memory",
            str(error).partition(". ")[0],
            "lower generation.max_rows (search) or training.trl.per_device_train_batch_size (training)",
        )
    if isinstance(error, MemoryError):
        return Explanation("out of memory", "", "lower generation.max_rows or generation.prompts_per_part")
    lines = str(error).strip().splitlines() or [""]
    return Explanation(f"internal error: {type(error).__name__}", lines[0], is_bug=True)


def print_error(error: BaseException) -> None:
    """Print an error to stderr; the traceback of an internal error goes to a file."""
    if console.mode.debug:
        print(redact("".join(traceback.format_exception(error))), file=sys.stderr, end="")
    if type(error).__name__ == "NoArgsIsHelpError":  # a group without a verb
        print(error.format_message(), file=sys.stderr)  # type: ignore[attr-defined]
        return
    explanation = explain(error)
    hint = explanation.hint
    if explanation.is_bug:
        where = "above" if console.mode.debug else f"in {_write_traceback(error)}"
        hint = f"please report it with the traceback {where}"
    for name, text in (("error", explanation.what), ("why", explanation.why), ("hint", hint)):
        if text:
            print(f"{name}: {redact(text)}", file=sys.stderr)


def _explain_csr_error(error: CsrError) -> Explanation:
    what, why = _split_message(error.message)
    return Explanation(what, _ERRNO_PREFIX.sub(r"\1", why), error.hint)


def _split_message(message: str) -> tuple[str, str]:
    """Split "what went wrong: why" into its two parts."""
    what, colon, why = message.partition(": ")
    return (what, why) if colon and " " in what else (message, "")  # before the colon may be a path or an option alone


def _explain_usage_error(error: Any, message: str) -> Explanation:
    """Describe what is wrong with a command line."""
    text, *suggestions = re.split(r"Did you mean |\(Possible options: ", message.strip())
    verb = error.ctx.command_path if getattr(error, "ctx", None) else "csr"
    likely = "".join(suggestions).strip(" ?')").replace(", ", " or ")
    hint = f"did you mean {likely}?" if likely else f"{verb} --help lists its arguments"
    what, why = _split_message(text[:1].lower() + text[1:].strip().rstrip(".").replace("option: ", "option "))
    why = why.removeprefix("Value error, ")
    return Explanation(what, why[:1].lower() + why[1:], hint)


def exit_code(error: BaseException) -> int:
    """Return 2 for a command line that cannot be parsed, 1 for all other errors."""
    return int(getattr(error, "exit_code", 1))


def _write_traceback(error: BaseException) -> Path:
    with tempfile.NamedTemporaryFile(
        "w", prefix="csr-error-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
    ) as file:
        file.write(redact("".join(traceback.format_exception(error))))
    return Path(file.name)
