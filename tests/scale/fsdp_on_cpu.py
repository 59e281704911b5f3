"""``csr`` with FSDP on CPUs: accelerate offers it on GPUs only, so it is told that gloo is such a device."""

from __future__ import annotations

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from csr_vlm.cli import main


def _as_if_gpu(self: PartialState, *_: object, **__: object) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def _on_cpu(self: PartialState) -> None:
    self.device = torch.device("cpu")


PartialState._prepare_backend = _as_if_gpu
PartialState.set_device = _on_cpu
main()
