"""Run ``csr`` with FSDP or DeepSpeed on CPUs by making accelerate, which offers both on GPUs only, believe in GPUs."""

from __future__ import annotations

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from csr_vlm.cli import main
from csr_vlm.training import distribution, dpo

gather_trained_weights = dpo.gather_trained_weights


def as_if_gpu(self: PartialState, *_: object, **__: object) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def on_cpu(self: PartialState) -> None:
    self.device = torch.device("cpu")


def check_shards_and_gather(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    for name, parameter in model.named_parameters() if distribution.requested_distribution(2) == "FSDP" else ():
        assert parameter.to_local().numel() < parameter.numel(), f"{name} is not sharded"
    return gather_trained_weights(model)


PartialState._prepare_backend = as_if_gpu
PartialState.set_device = on_cpu
dpo.gather_trained_weights = check_shards_and_gather
main()
