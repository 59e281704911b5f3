"""Convert original tensors to those of the target, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from csr_vlm.convert.layouts import DROPPED_NAMES, disk_name, module_name
from csr_vlm.convert.source import Lora, Original
from csr_vlm.convert.target import Target
from csr_vlm.core.errors import CsrError
from csr_vlm.models.checkpoints import read_tensors

_EMBEDDINGS = (disk_name("model.language_model.embed_tokens.weight"), disk_name("lm_head.weight"))
_SECOND_LAYER = disk_name("model.multi_modal_projector.linear_2.weight")
_SECOND_BIAS = disk_name("model.multi_modal_projector.linear_2.bias")


def name_map(original: Original, target: Target) -> dict[str, str]:
    """Map original names to names on disk, so that every expected tensor occurs once and every original one is used.

    Raises:
        CsrError: Tensors are missing or left over; the message lists them.
    """
    modules = {
        name: module_name(name, original.projector) for name in original.tensors if not DROPPED_NAMES.search(name)
    }
    left_over = sorted(name for name, module in modules.items() if module is None)
    names = {name: disk_name(module) for name, module in modules.items() if module is not None}
    left_over += sorted(name for name, disk in names.items() if disk not in target.shapes)
    created = {_SECOND_LAYER, _SECOND_BIAS} if original.projector == "linear" else set()
    missing = sorted(target.shapes.keys() - set(names.values()) - created)
    unknown = sorted({f"{name}.weight" for name in original.lora.modules} - names.keys()) if original.lora else []
    problems = [
        f"{len(tensors)} {problem}: {', '.join(tensors[:8])}{', ...' if len(tensors) > 8 else ''}"
        for problem, tensors in (("missing", missing), ("left over", left_over), ("adapted but absent", unknown))
        if tensors
    ]
    if problems:
        raise CsrError(
            f"the tensors do not fit a {original.kind} checkpoint; {'; '.join(problems)}",
            "check that the model is like LLaVA-1.5 and that config.json belongs to it",
        )
    return names


def embedding_dtype(original: Original) -> torch.dtype:
    """Return the data type of the embeddings, which all tensors get by default, as LLaVA's vision tower does."""
    name = "model.embed_tokens.weight"
    _, tensor = next(read_tensors({name: original.tensors[name]}))
    dtype: torch.dtype = tensor.dtype
    return dtype


def convert_tensors(
    original: Original, target: Target, names: dict[str, str], dtype: torch.dtype, merge: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name on disk, tensor) for every tensor of the target.

    New rows of the embeddings are the mean of the old ones, so by Jensen's inequality a new
    token is never more likely than the average token.

    Args:
        original: Source checkpoint.
        target: Expected result.
        names: Result of :func:`name_map`.
        dtype: Data type of all tensors.
        merge: Add the LoRA to the weights, computed in float32.

    Raises:
        CsrError: A tensor's shape differs from the configuration's.
    """
    for name, stored in read_tensors({name: original.tensors[name] for name in names}):
        disk, tensor = names[name], stored
        if merge and original.lora is not None:
            tensor = _merge_lora(name, tensor, original.lora)
        tensor = tensor.to(dtype)
        if disk in _EMBEDDINGS:
            tensor = _append_mean_rows(tensor, target.shapes[disk][0])
        if tensor.shape != target.shapes[disk]:
            raise CsrError(
                f"{name} has shape {tuple(tensor.shape)}, but config.json requires {tuple(target.shapes[disk])}",
                "check that config.json belongs to these weights, and --vision to this checkpoint",
            )
        yield disk, tensor
    if original.projector == "linear":
        width = target.shapes[_SECOND_BIAS][0]
        yield _SECOND_LAYER, torch.eye(width, dtype=dtype)
        yield _SECOND_BIAS, torch.zeros(width, dtype=dtype)


def adapter_tensors(lora: Lora) -> dict[str, Any]:
    """Return a LoRA's tensors under the names that PEFT uses on transformers' LLaVA."""
    tensors = {}
    for name, tensor in lora.tensors.items():
        module = module_name(name, "linear")
        assert module is not None, name
        tensors[f"base_model.model.{module}"] = tensor.contiguous()
    return tensors


def _merge_lora(name: str, weight: torch.Tensor, lora: Lora) -> torch.Tensor:
    """Return W + scale B A, or W if the LoRA does not adapt it."""
    module = name.removesuffix(".weight")
    down = lora.tensors.get(f"{module}.lora_A.weight")
    if down is None:
        return weight
    up = lora.tensors[f"{module}.lora_B.weight"]
    return weight.float() + (up.float() @ down.float()) * lora.scale


def _append_mean_rows(embeddings: torch.Tensor, num_rows: int) -> torch.Tensor:
    if len(embeddings) >= num_rows:
        return embeddings
    mean = embeddings.float().mean(dim=0, keepdim=True).to(embeddings.dtype)
    return torch.cat([embeddings, mean.expand(num_rows - len(embeddings), -1)])
