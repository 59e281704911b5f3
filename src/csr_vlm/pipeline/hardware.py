"""Describe the GPUs that a run can be planned for, and this machine."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from csr_vlm.core.errors import CsrError, suggestion


@dataclass(frozen=True)
class Hardware:
    """Hold what costs depend on: dense peak rates from data sheets, or rates measured on this machine."""

    name: str
    flops: float
    """Matrix products in bfloat16 (float32 on a CPU), in operations per second."""
    float32_flops: float
    bandwidth: float
    """Of the memory, in bytes per second."""
    memory: float
    """In bytes; 0 if the run shares it with the host."""
    count: int = 1
    is_cpu: bool = False
    measured: bool = False
    """Whether the rates were measured, so that they are reached and not peaks."""

    @property
    def label(self) -> str:
        """Return the name with the count, such as ``8 x H200``."""
        return self.name if self.count == 1 else f"{self.count} x {self.name}"


GPUS = {
    "a100-80": Hardware("A100 80 GB", 312e12, 19.5e12, 2.04e12, 80e9),
    "h100": Hardware("H100", 989e12, 67e12, 3.35e12, 80e9),
    "h200": Hardware("H200", 989e12, 67e12, 4.8e12, 141e9),
    "4090": Hardware("RTX 4090", 165e12, 82.6e12, 1.008e12, 24e9),
}
"""GPUs by the name that ``--gpu`` takes, with the rates of NVIDIA's data sheets."""
_DEVICE_NAMES = {"a100-80": r"A100.*80", "h100": "H100", "h200": "H200", "4090": r"RTX 4090(?! D|.*Laptop)"}
"""Patterns of the names by which torch calls them."""


def parse_gpu(text: str) -> Hardware:
    """Read the value of ``--gpu``: a name, and optionally the number of GPUs after a colon.

    Raises:
        CsrError: There is no such GPU, the number is not positive, or ``auto`` is asked for where there is no GPU.

    Example:
        >>> parse_gpu("h200:8").label
        '8 x H200'
    """
    name, colon, count = text.lower().partition(":")
    if colon and not re.fullmatch(r"[1-9][0-9]{0,5}", count):
        raise CsrError(f"--gpu {text!r} has no valid number of GPUs", "write --gpu h200:8")
    number = int(count or 1)
    if name == "auto":
        found = this_gpu()
        if found is None:
            raise CsrError("--gpu auto: torch sees no GPU on this machine", f"name one: --gpu {', '.join(GPUS)}")
        return replace(found, count=number)
    if name not in GPUS:
        raise CsrError(f"--gpu {text!r} is not a known GPU", suggestion(name, [*GPUS, "auto"]))
    return replace(GPUS[name], count=number)


def this_gpu(device: str = "cuda") -> Hardware | None:
    """Return this machine's GPU: by its data sheet if it is a known one, else by a measurement; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    known = known_gpu(properties.name)
    if known is not None:
        return known
    half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    flops, single = measured_flops(device, half), measured_flops(device, torch.float32)
    return Hardware(properties.name, flops, single, _measured_bandwidth(device), properties.total_memory, measured=True)


def this_cpu() -> Hardware:
    """Measure the rates of this machine's CPU, in a tenth of a second."""
    import torch

    flops = measured_flops("cpu", torch.float32)
    return Hardware("cpu", flops, flops, _measured_bandwidth("cpu"), 0.0, is_cpu=True, measured=True)


def known_gpu(device_name: str) -> Hardware | None:
    """Return the data sheet of a GPU by the name that torch gives it; None if it is not known.

    Example:
        >>> known_gpu("NVIDIA H200").memory
        141000000000.0
    """
    names = (name for name, pattern in _DEVICE_NAMES.items() if re.search(pattern, device_name))
    name = next(names, None)
    return None if name is None else GPUS[name]


def measured_flops(device: str, dtype: Any) -> float:
    """Measure the throughput of matrix products on a device, in floating-point operations per second."""
    import torch

    size = 512 if device == "cpu" else 4096
    left = torch.randn(size, size, device=device).to(dtype)

    def multiply() -> None:
        float((left @ left)[0, 0])  # Wait for the GPU.

    return 2 * size**3 / _median_seconds(multiply)


def _measured_bandwidth(device: str) -> float:
    import torch

    source = torch.zeros(2**22 if device == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        float(target[0])

    return 2 * source.nbytes / _median_seconds(copy)


def _median_seconds(call: Callable[[], None]) -> float:
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[2]
