"""Replace small modules of a loaded model by ones that launch fewer operations, for decoding in half precision.

A decoding step feeds few tokens through many layers, so on a GPU its time is that of launching
operations. Two modules launch most of them:

- PEFT's LoRA in float32 beside half-precision weights casts and scales: eight operations a linear
  layer. :class:`PlainLora` holds A and (alpha / r) B in the model's own data type and adds two:
  h = W x + ((alpha / r) B) (A x).
- RMSNorm, which transformers computes in eight operations, is one in PyTorch.

Both round differently, by the spacing of the model's data type at most. Whoever uses them compares
log-probabilities with those of the model before, which is what training uses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.nn import functional

_PLAIN_BASES = ("Linear", "Linear4bit")
"""Classes of linear layers whose output has the model's data type."""
_NORM_DIFFERENCE = 1e-4
"""Largest difference from a norm's own output in float32, for inputs near 1; another formula differs by more."""


class PlainLora(torch.nn.Module):
    """Compute a linear layer and its adapter in three operations, in the layer's data type.

    Args:
        base: The linear layer.
        down: A, of shape (r, inputs).
        up: (alpha / r) B, of shape (outputs, r).

    Both are kept transposed, so that no view of them is made at every step.
    """

    def __init__(self, base: torch.nn.Module, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.base_layer: Any = base
        self._is_linear = type(base) is torch.nn.Linear
        self.down = torch.nn.Parameter(down.t(), requires_grad=False)
        self.up = torch.nn.Parameter(up.t(), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return W x + b + up (down x), of shape (..., outputs)."""
        base = self.base_layer
        flat = inputs.reshape(-1, inputs.shape[-1])  # (tokens, inputs)
        # A linear layer without hooks needs no call of its own.
        output = functional.linear(flat, base.weight, base.bias) if self._is_linear else base(flat)
        output.addmm_(torch.mm(flat, self.down), self.up)
        return output.view(*inputs.shape[:-1], -1)


class FusedRmsNorm(torch.nn.Module):
    """Compute x / sqrt(mean(x^2) + eps) * weight in one operation, in float32 inside."""

    def __init__(self, weight: torch.nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the normalized hidden states, of the same shape."""
        return functional.rms_norm(hidden_states, tuple(self.weight.shape), self.weight, self.variance_epsilon)


def use_plain_lora(model: torch.nn.Module, dtype: torch.dtype) -> Callable[[], None]:
    """Replace the adapters of linear layers by :class:`PlainLora`; others, such as DoRA, stay as they are.

    Args:
        model: Model with one active PEFT adapter, or without any.
        dtype: Data type of the model.

    Returns:
        A function that undoes it.
    """
    return _replace(model, lambda module: _plain_lora(module, dtype))


def use_fused_norms(model: torch.nn.Module) -> Callable[[], None]:
    """Replace RMSNorms that compute the same by :class:`FusedRmsNorm`.

    Returns:
        A function that undoes it.
    """
    return _replace(model, _fused_norm)


def _plain_lora(module: torch.nn.Module, dtype: torch.dtype) -> PlainLora | None:
    """Return the replacement of a LoRA layer, or None for everything that is not a plain one."""
    if not isinstance(module, LoraLayer) or type(module).__name__ not in _PLAIN_BASES:
        return None
    active = list(module.active_adapters)
    if len(active) != 1 or active[0] not in module.lora_A or module.disable_adapters or module.merged:
        return None
    (name,) = active
    base: Any = module.base_layer
    is_plain = type(base).__name__ in _PLAIN_BASES and not module.lora_variant and not module.lora_bias.get(name)
    if not is_plain or getattr(module, "fan_in_fan_out", False):
        return None
    down, up = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach()
    # Scaled before it is rounded: alpha / r is rarely anything but a power of two, which costs no bit.
    return PlainLora(base, down.to(dtype), (up * module.scaling[name]).to(dtype))


@torch.no_grad()
def _fused_norm(module: torch.nn.Module) -> FusedRmsNorm | None:
    """Return the replacement of an RMSNorm, or None for modules that compute something else."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or weight is None or not isinstance(eps, float):
        return None
    fused = FusedRmsNorm(weight, eps)
    example = torch.linspace(-2, 2, 3 * weight.numel(), device=weight.device).view(3, *weight.shape)
    expected = module(example).float()
    found = functional.rms_norm(example, tuple(weight.shape), weight.float(), eps)
    return fused if bool((expected - found).abs().max() <= _NORM_DIFFERENCE * weight.abs().max().clamp(min=1)) else None


def _replace(
    model: torch.nn.Module, replacement: Callable[[torch.nn.Module], torch.nn.Module | None]
) -> Callable[[], None]:
    replaced: list[tuple[torch.nn.Module, str, torch.nn.Module]] = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            new = replacement(child)
            if new is not None:
                setattr(parent, name, new.train(child.training))
                replaced.append((parent, name, child))

    def undo() -> None:
        for parent, name, child in replaced:
            setattr(parent, name, child)

    return undo
