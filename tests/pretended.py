"""Run code as if on a GPU, on a machine without one, and count what it would launch there.

Tensors on PyTorch's ``meta`` device have a shape but no numbers, so whatever would make the host
wait for a number of the device (``item``, ``tolist``, ``bool``, ``nonzero``) raises by itself.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_LAUNCH_NOTHING = {
    "view", "_unsafe_view", "_reshape_alias", "t", "transpose", "permute", "expand", "slice", "select", "narrow",
    "unsqueeze", "squeeze", "alias", "detach", "as_strided", "split", "split_with_sizes", "unbind", "empty",
    "empty_strided", "new_empty", "empty_like", "lift_fresh",
}  # fmt: skip
"""Operations that only describe memory, or allocate it."""
_ONE_KERNEL = {"rms_norm"}
"""Operations that are one kernel on CUDA though their general definition consists of several."""
_TRANSFERS = {"_to_copy", "copy_"}


class LaunchCounter(TorchDispatchMode):
    """Count operations as a GPU would launch them, and views, by name.

    Raises:
        RuntimeError: An operation has tensors of two devices.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.views: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in _ONE_KERNEL and func._can_decompose():
            with self:
                return func.decompose(*args, **(kwargs or {}))
        # A number in a tensor without dimensions may lie anywhere.
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        devices = {tensor.device.type for tensor in tensors}
        if len(devices) > 1 and name not in _TRANSFERS:
            raise RuntimeError(f"{name} has tensors on {' and '.join(sorted(devices))}")
        counts = self.views if func.is_view or name in _LAUNCH_NOTHING else self.launches
        counts[name] += 1
        return func(*args, **(kwargs or {}))
