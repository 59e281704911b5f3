"""What the loaders of policies and scorers share."""

from __future__ import annotations

from pathlib import Path

from csr_vlm.errors import CsrError, reason_of


def resolve_device(name: str) -> str:
    """Turn ``auto`` into cuda where there is one, else cpu."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_dtype(name: str, device: str) -> str:
    """Turn ``auto`` into bfloat16 on a GPU and float32 on a CPU."""
    if name != "auto":
        return name
    return "float32" if device == "cpu" else "bfloat16"


def unloadable(what: str, path: str, error: Exception) -> CsrError:
    """Word why a checkpoint could not be loaded."""
    # A hub id is OWNER/NAME; anything else can only be a directory.
    local = path.startswith((".", "/", "~")) or path.count("/") != 1
    missing = local and not Path(path).is_dir()
    reason = "there is no such directory" if missing else reason_of(error)
    return CsrError(f"the {what} {path} cannot be loaded: {reason}", f"set {what}.path to a directory or a hub id")
