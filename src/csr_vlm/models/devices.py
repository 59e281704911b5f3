"""Resolve the device and the data type that models are loaded with."""

from __future__ import annotations

from csr_vlm.core.errors import CsrError


def resolve_device(name: str) -> str:
    """Resolve ``auto`` to cuda if there is a GPU, else to cpu; return other names unchanged.

    Raises:
        CsrError: The name is not a valid torch device, or this machine does not have the device.
    """
    if name == "cpu":
        return name
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CsrError(
            f"model.device: {name!r} is not a valid torch device", "set it to one of: auto, cpu, cuda, cuda:1"
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        reason = "this torch is built for the CPU only" if torch.version.cuda is None else "torch sees no GPU"
        raise CsrError(
            f"model.device {name!r} cannot be used: {reason}", "set model.device=cpu, or see nvidia-smi and csr env"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CsrError(
            f"there is no device {name}: the number of GPUs is {torch.cuda.device_count()}", "count from cuda:0"
        )
    return name


def device_name(device: str) -> str:
    """Return the product name of a GPU, such as ``NVIDIA H200``, or the type of another device, such as ``cpu``."""
    import torch

    resolved = resolve_device(device)
    return torch.cuda.get_device_name(resolved) if resolved.startswith("cuda") else resolved.partition(":")[0]


def count_gpus() -> int:
    """Return the number of visible GPUs."""
    import torch

    return torch.cuda.device_count()


def resolve_dtype(name: str, device: str) -> str:
    """Resolve ``auto`` to float32 on a CPU and to bfloat16 elsewhere; return other names unchanged."""
    if name != "auto":
        return name
    return "float32" if device == "cpu" else "bfloat16"
