"""Distribute DPO over several processes: verify the distribution, and combine what processes compute.

Accelerate chooses what wraps the model (DDP, FSDP, DeepSpeed) from the launcher's environment.
Where it cannot do what was requested it may silently do less, so the result is compared with the
request before the first step.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from csr_vlm.core.errors import CsrError

_BATCH = "per_device_train_batch_size"
_ACCUMULATION = "gradient_accumulation_steps"
_TRL_BATCH = 8
"""Default of ``per_device_train_batch_size`` in TRL."""


def requested_distribution(processes: int) -> str:
    """Return the distribution that the launcher's environment requests: NO, DDP, FSDP or DEEPSPEED."""
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            return name
    return "DDP" if processes > 1 else "NO"


def refuse_ram_efficient_loading() -> None:
    """Refuse accelerate's setting that loads weights in the first process only.

    All other processes would generate with uninitialized weights.

    Raises:
        CsrError: FSDP is to be used with ``fsdp_cpu_ram_efficient_loading``.
    """
    if (
        requested_distribution(1) == "FSDP"
        and os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true"
    ):
        raise CsrError(
            "fsdp_cpu_ram_efficient_loading leaves all processes but the first without weights to generate with",
            "set it to false in accelerate's configuration, as recipes/accelerate/fsdp2.yaml does",
        )


def remove_absent_no_split_modules(model: Any) -> None:
    """Remove the names of layers that a model does not have from its list of modules not to split.

    FSDP wraps the layers on that list and fails on a name it cannot find; a model of two towers
    inherits the names of both towers' libraries.
    """
    present = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = present & set(model._no_split_modules or ())


def require_distribution(state: Any, processes: int) -> str:
    """Compare the distribution that accelerate set up with the one that was requested.

    Args:
        state: ``accelerate.state.AcceleratorState`` of the trainer.
        processes: Number of processes of the run.

    Returns:
        Accelerate's name of the distribution, such as ``MULTI_GPU``.

    Raises:
        CsrError: They differ.
    """
    requested, actual = requested_distribution(processes), state.distributed_type.value
    name = "DDP" if actual.startswith("MULTI_") else actual
    if name != requested or state.num_processes != processes:
        raise CsrError(
            f"{requested} over {processes} processes was requested, but accelerate set up {actual} over "
            f"{state.num_processes}",
            "FSDP and DeepSpeed need GPUs; docs/scaling.md has the commands",
        )
    return str(actual)


def pairs_per_step(trl: Mapping[str, Any]) -> int:
    """Return the number of pairs of a step, however it is divided into passes and among processes.

    Args:
        trl: Options of TRL's trainer; those that are missing have TRL's defaults.

    Example:
        >>> pairs_per_step({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8})
        16
    """
    return int(trl.get(_BATCH, _TRL_BATCH)) * int(trl.get(_ACCUMULATION, 1))


def shards_everything() -> bool:
    """Return whether the launcher requests ZeRO-3, which needs all weights in one data type."""
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "").strip()
    return requested_distribution(1) == "DEEPSPEED" and stage == "3"


def gather_trained_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gather the trainable weights by name from all processes that hold a shard of them; all must call this."""
    weights = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        with _gathered(parameter):
            value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            weights[name] = value.detach().cpu().clone()
    return weights


def _gathered(parameter: torch.nn.Parameter) -> Any:
    """Return a context in which a parameter is whole; DeepSpeed's ZeRO-3 leaves it empty otherwise."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def sum_over_processes(values: Any) -> Any:
    """Return the sum of the processes' arrays, in every process."""
    from accelerate.utils import gather_object

    return sum(gather_object([values]))


def max_over_processes(value: float) -> float:
    """Return the largest of the processes' values, so that all processes decide alike."""
    from accelerate.utils import gather_object

    return float(max(gather_object([value])))
