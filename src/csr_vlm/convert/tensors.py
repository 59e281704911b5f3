"""Original tensors as the target has them, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from csr_vlm.convert.layouts import DROPPED, disk_name, module_name
from csr_vlm.convert.source import Lora, Original
from csr_vlm.convert.target import Target
from csr_vlm.core.errors import CsrError
from csr_vlm.models.checkpoints import read_tensors

_EMBEDDINGS = (disk_name("model.language_model.embed_tokens.weight"), disk_name("lm_head.weight"))
_SECOND_LAYER = disk_name("model.multi_modal_projector.linear_2.weight")
_SECOND_BIAS = disk_name("model.multi_modal_projector.linear_2.bias")


def name_map(original: Original, target: Target) -> dict[str, str]:
    """Map original names to names on disk: every expected tensor once, every original one used.

    Raises:
        CsrError: Tensors are missing or left over; they are listed.
    """
    modules = {name: module_name(name, original.projector) for name in original.tensors if not DROPPED.search(name)}
    left_over = sorted(name for name, module in modules.items() if module is None)
    names = {name: disk_name(module) for name, module in modules.items() if module is not None}
    left_over += sorted(name for name, disk in names.items() if disk not in target.shapes)
    made = {_SECOND_LAYER, _SECOND_BIAS} if original.projector == "linear" else set()
    missing = sorted(target.shapes.keys() - set(names.values()) - made)
    strange = sorted({f"{name}.weight" for name in original.lora.modules} - names.keys()) if original.lora else []
    problems = [
        f"{len(found)} {what}: {', '.join(found[:8])}{', ...' if len(found) > 8 else ''}"
        for what, found in (("missing", missing), ("left over", left_over), ("adapted but absent", strange))
        if found
    ]
    if problems:
        raise CsrError(
            f"the tensors do not fit a {original.kind} checkpoint; {'; '.join(problems)}",
            "is it a LLaVA-1.5-like model, and does config.json belong to it?",
        )
    return names


def common_dtype(original: Original) -> torch.dtype:
    """The type of the embeddings, which all tensors get: LLaVA loads its vision tower in it too."""
    name = "model.embed_tokens.weight"
    _, tensor = next(read_tensors({name: original.tensors[name]}))
    dtype: torch.dtype = tensor.dtype
    return dtype


def converted(
    original: Original, target: Target, names: dict[str, str], dtype: torch.dtype, merge: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name on disk, tensor) of the whole target.

    New rows of the embeddings are the mean of the old ones, so by Jensen's inequality a new
    token is never more likely than the average one.

    Args:
        original: What is read.
        target: What it must become.
        names: From :func:`name_map`.
        dtype: Of all tensors.
        merge: Add the LoRA to the weights, in float32.

    Raises:
        CsrError: A tensor has another shape than the configuration says.
    """
    for name, stored in read_tensors({name: original.tensors[name] for name in names}):
        disk, tensor = names[name], stored
        if merge and original.lora is not None:
            tensor = _with_lora(name, tensor, original.lora)
        tensor = tensor.to(dtype)
        if disk in _EMBEDDINGS:
            tensor = _grown(tensor, target.shapes[disk][0])
        if tensor.shape != target.shapes[disk]:
            raise CsrError(
                f"{name} is {tuple(tensor.shape)} where config.json asks for {tuple(target.shapes[disk])}",
                "does config.json belong to these weights, and --vision to this checkpoint?",
            )
        yield disk, tensor
    if original.projector == "linear":
        width = target.shapes[_SECOND_BIAS][0]
        yield _SECOND_LAYER, torch.eye(width, dtype=dtype)
        yield _SECOND_BIAS, torch.zeros(width, dtype=dtype)


def adapter_tensors(lora: Lora) -> dict[str, Any]:
    """Name a LoRA's tensors as PEFT does on transformers' LLaVA."""
    renamed = {}
    for name, tensor in lora.tensors.items():
        module = module_name(name, "linear")
        assert module is not None, name
        renamed[f"base_model.model.{module}"] = tensor.contiguous()
    return renamed


def _with_lora(name: str, weight: torch.Tensor, lora: Lora) -> torch.Tensor:
    """W + scale B A."""
    module = name.removesuffix(".weight")
    down = lora.tensors.get(f"{module}.lora_A.weight")
    if down is None:
        return weight
    up = lora.tensors[f"{module}.lora_B.weight"]
    return weight.float() + (up.float() @ down.float()) * lora.scale


def _grown(rows: torch.Tensor, number: int) -> torch.Tensor:
    if len(rows) >= number:
        return rows
    mean = rows.float().mean(dim=0, keepdim=True).to(rows.dtype)
    return torch.cat([rows, mean.expand(number - len(rows), -1)])
