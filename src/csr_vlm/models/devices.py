"""What the loaders of policies and scorers share."""

from __future__ import annotations

import re
from pathlib import Path

from csr_vlm.core.errors import CsrError, reason_of


def resolve_device(name: str) -> str:
    """Turn ``auto`` into cuda where there is one, else cpu.

    Raises:
        CsrError: A device is named that torch does not know or that this machine lacks.
    """
    if name == "cpu":
        return name
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CsrError(f"model.device {name!r} is none that torch knows", "auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        why = "this torch is built for the CPU only" if torch.version.cuda is None else "torch sees no GPU"
        raise CsrError(
            f"model.device {name!r} cannot be used: {why}", "set model.device=cpu, or see nvidia-smi and csr env"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CsrError(f"there is no {name}: the machine has {torch.cuda.device_count()} GPUs", "count from cuda:0")
    return name


def resolve_dtype(name: str, device: str) -> str:
    """Turn ``auto`` into bfloat16 on a GPU and float32 on a CPU."""
    if name != "auto":
        return name
    return "float32" if device == "cpu" else "bfloat16"


def unloadable(what: str, path: str, error: Exception) -> CsrError:
    """Word why a checkpoint could not be loaded."""
    # A hub id is OWNER/NAME; anything else can only be a directory, and so is what lies in a folder that is here.
    local = path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).parent.is_dir()
    if local and not Path(path).is_dir():
        reason = "there is no such directory"
    elif found := re.match(r"Unrecognized configuration class <class '[\w.]*?(\w+)Config'> for", str(error)):
        reason = f"transformers has no {found[1]} that turns images and text into text"
    else:
        reason = reason_of(error)
    return CsrError(f"the {what} {path} cannot be loaded: {reason}", f"set {what}.path to a directory or a hub id")
