"""DPO over several processes: that it is the distribution asked for, and the same batches as in one.

What wraps the model (DDP, FSDP, DeepSpeed) is accelerate's choice, made from the launcher's
environment. Where it cannot do what was asked it may quietly do less, so what came of it is
compared with what was asked before the first step.
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
"""What TRL takes for ``per_device_train_batch_size`` where nothing is said."""


def asked_for(processes: int) -> str:
    """Name the distribution that the launcher's environment asks for: NO, DDP, FSDP or DEEPSPEED."""
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            return name
    return "DDP" if processes > 1 else "NO"


def refuse_lazy_weights() -> None:
    """Refuse a setting under which all processes but the first would generate from unread weights.

    Raises:
        CsrError: accelerate is to load weights in the first process only.
    """
    if asked_for(1) == "FSDP" and os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        raise CsrError(
            "fsdp_cpu_ram_efficient_loading leaves the other processes without weights to generate with",
            "set it to false in accelerate's configuration, as recipes/accelerate/fsdp2.yaml does",
        )


def name_layers_that_are_there(model: Any) -> None:
    """Take from a model's list of layers that stay whole those that it does not have.

    FSDP wraps the layers on that list and stops at a name it cannot find; a model of two
    towers inherits the names of both towers' libraries.
    """
    present = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = present & set(model._no_split_modules or ())


def require_distribution(state: Any, processes: int) -> str:
    """Compare what accelerate made of the environment with what was asked for.

    Args:
        state: ``accelerate.state.AcceleratorState`` of the trainer.
        processes: How many work on this run.

    Returns:
        Accelerate's name for it, such as ``MULTI_GPU``.

    Raises:
        CsrError: They differ.
    """
    asked, found = asked_for(processes), state.distributed_type.value
    name = "DDP" if found.startswith("MULTI_") else found
    if name != asked or state.num_processes != processes:
        raise CsrError(
            f"{asked} over {processes} processes was asked for, but accelerate set up {found} over "
            f"{state.num_processes}",
            "FSDP and DeepSpeed need GPUs; docs/scaling.md has the commands",
        )
    return str(found)


def shared_batch(trl: Mapping[str, Any], processes: int) -> dict[str, int]:
    """Split the batch of one optimiser step among processes, so that the step stays the same.

    Gradient accumulation is given up first, then the batch of a process, which never grows.

    Returns:
        What a process takes: ``per_device_train_batch_size`` and ``gradient_accumulation_steps``.

    Raises:
        CsrError: The pairs of a step cannot be dealt out evenly.

    Example:
        >>> shared_batch({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}, 4)
        {'per_device_train_batch_size': 2, 'gradient_accumulation_steps': 2}
        >>> shared_batch({"per_device_train_batch_size": 16}, 4)
        {'per_device_train_batch_size': 4, 'gradient_accumulation_steps': 1}
    """
    batch, accumulation = int(trl.get(_BATCH, _TRL_BATCH)), int(trl.get(_ACCUMULATION, 1))
    share, rest = divmod(batch * accumulation, processes)
    if rest:
        raise CsrError(
            f"a step of {batch * accumulation} pairs cannot be dealt out evenly to {processes} processes",
            f"let training.trl.{_BATCH} times {_ACCUMULATION} be a multiple of {processes}",
        )
    own = next(size for size in range(min(batch, share), 0, -1) if share % size == 0)
    return {_BATCH: own, _ACCUMULATION: share // own}


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gather what trains, by its name, from all processes that hold a piece of it; all must call this."""
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        with _gathered(parameter):
            value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            found[name] = value.detach().cpu().clone()
    return found


def _gathered(parameter: torch.nn.Parameter) -> Any:
    """DeepSpeed's ZeRO-3 leaves a parameter empty until it is asked for."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def largest_anywhere(value: float) -> float:
    """Return the largest of the processes' values, so that all decide alike."""
    from accelerate.utils import gather_object

    return float(max(gather_object([value])))
