"""Pack both responses of a pair into one row, so that their common tokens are computed once.

A packed row holds the common part of chosen and rejected (image, question, and the tokens that
both begin with), then the rest of chosen, then the rest of rejected::

    tokens      <s> <img> <img> Why ?   There is a   red boat .   blue boat .
    positions    0    1     2   3   4     5   6  7    8   9   10    8    9  10
    segment      0    0     0   0   0     0   0  0    1   1   1     2    2   2

A token attends to the earlier tokens of its own segment and of segment 0, so each side attends to
the same tokens at the same positions as in a row of its own. The output layer is computed only
where a response token is predicted, once per token; the results are then arranged as TRL's
DPOTrainer expects them, chosen rows first, then rejected rows. Losses and metrics are TRL's own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch

from csr_vlm.models.encoding import EncodedPrompt, batch_rows, image_tensors
from csr_vlm.models.families import family_of

_COMMON, _CHOSEN, _REJECTED, _PADDING = range(4)
_MASKED_IMPLEMENTATIONS = ("sdpa", "eager")
"""Attention implementations that accept a mask of every token against every other."""
_PACKING_KEYS = frozenset({"segment_ids", "targets", "predictor_index", "target_index"})
"""Tensors of a packed batch that are not inputs of the model."""


def packing_obstacle(config: Any) -> str | None:
    """Return why a model of this configuration cannot use packed rows; None if it can."""
    text = config.get_text_config()
    if not family_of(config).causal:
        return f"{config.model_type} is not known to use strictly causal attention"
    if text._attn_implementation not in _MASKED_IMPLEMENTATIONS:
        return f"the attention implementation {text._attn_implementation!r} accepts no custom mask"
    unsupported = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unsupported:
        return f"layers of type {min(unsupported)!r} accept no custom mask"
    if hasattr(text, "output_router_logits"):
        return "its experts are balanced over the tokens of unpacked rows"
    return None


def attention_window(config: Any) -> int | None:
    """Return the sliding window of the narrowest layer, in tokens; None where all layers attend to everything.

    A custom mask is the same for all layers, so packing is exact for rows within the window only.
    """
    text = config.get_text_config()
    if "sliding_attention" in (getattr(text, "layer_types", None) or ["sliding_attention"]):
        return getattr(text, "sliding_window", None)
    return None


def common_prefix_length(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """Count the tokens that both responses begin with.

    Example:
        >>> common_prefix_length([20, 21, 22], [20, 21, 30])
        2
    """
    pairs = enumerate(zip(chosen, rejected, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(chosen), len(rejected)))


def pack(
    encoded: Sequence[EncodedPrompt], chosen: Sequence[Sequence[int]], rejected: Sequence[Sequence[int]], pad_id: int
) -> dict[str, torch.Tensor]:
    """Pack pairs into one row each, padded on the right.

    Args:
        encoded: Prompt of each pair.
        chosen: Token ids of each preferred response.
        rejected: Token ids of each other response.
        pad_id: Token id of the padding.

    Returns:
        The model's inputs of shape (pairs, width), with positions that have three dimensions of
        shape (3, pairs, width); the image tensors, once per pair; and

        - ``segment_ids`` (pairs, width): 0 common, 1 chosen, 2 rejected, 3 padding.
        - ``targets`` (pairs, targets): every response token once, padded with -100.
        - ``predictor_index`` (pairs, targets): index in the row of the token that predicts it.
        - ``target_index`` (2 * pairs, longest response): index in ``targets`` of each token of the
          unpacked responses, chosen rows first.

    Example:
        Two pairs, with prompts of three and two tokens. In the first, 20 is common; in the
        second, chosen is the beginning of rejected.

        >>> prompts = [[1, 9, 5], [1, 9]]
        >>> encoded = [EncodedPrompt(torch.tensor(ids), torch.arange(len(ids)), {}, {}) for ids in prompts]
        >>> packed = pack(encoded, [[20, 21, 22], [40]], [[20, 31], [40, 41]], pad_id=0)
        >>> packed["input_ids"]
        tensor([[ 1,  9,  5, 20, 21, 22, 31],
                [ 1,  9, 40, 41,  0,  0,  0]])
        >>> packed["segment_ids"]
        tensor([[0, 0, 0, 0, 1, 1, 2],
                [0, 0, 0, 2, 3, 3, 3]])
        >>> packed["position_ids"]
        tensor([[0, 1, 2, 3, 4, 5, 4],
                [0, 1, 2, 3, 0, 0, 0]])
        >>> packed["targets"]
        tensor([[  20,   21,   22,   31],
                [  40,   41, -100, -100]])
        >>> packed["predictor_index"]
        tensor([[2, 3, 4, 3],
                [1, 2, 0, 0]])
        >>> packed["target_index"]
        tensor([[0, 1, 2],
                [0, 0, 0],
                [0, 3, 0],
                [0, 1, 0]])
    """
    common_lengths = [common_prefix_length(*sides) for sides in zip(chosen, rejected, strict=True)]
    responses = [[*left, *right[common:]] for left, right, common in zip(chosen, rejected, common_lengths, strict=True)]
    batch = batch_rows(encoded, responses, pad_id, "right")
    segment_ids = torch.full_like(batch["input_ids"], _PADDING)
    predictor_index: list[torch.Tensor] = []
    chosen_index: list[torch.Tensor] = []
    rejected_index: list[torch.Tensor] = []
    for row, (item, left, right, common) in enumerate(zip(encoded, chosen, rejected, common_lengths, strict=True)):
        start = len(item.input_ids)
        end = start + len(left)
        segment_ids[row, : start + common] = _COMMON
        segment_ids[row, start + common : end] = _CHOSEN
        segment_ids[row, end : end + len(right) - common] = _REJECTED
        # Rejected continues at the position where the common tokens end, not where chosen ends.
        batch["position_ids"][..., row, end:] -= len(left) - common
        predictors = torch.arange(len(responses[row])) + start - 1
        predictors[len(left) : len(left) + 1] = start + common - 1
        predictor_index.append(predictors)
        chosen_index.append(torch.arange(len(left)))
        index = torch.arange(len(right))
        rejected_index.append(torch.where(index < common, index, index + len(left) - common))
    del batch["attention_mask"]
    batch |= {
        "segment_ids": segment_ids,
        "targets": _pad([torch.tensor(ids, dtype=torch.long) for ids in responses], -100),
        "predictor_index": _pad(predictor_index, 0),
        "target_index": _pad(chosen_index + rejected_index, 0),
    }
    return batch | image_tensors(encoded)


def _pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def packed_attention_mask(segment_ids: torch.Tensor) -> torch.Tensor:
    """Compute which tokens attend to which.

    Args:
        segment_ids: Segments of shape (pairs, width).

    Returns:
        Booleans of shape (pairs, 1, width, width): [b, 0, i, j] is whether i attends to j. Padding
        attends to padding as well, since a softmax over nothing is undefined.

    Example:
        >>> packed_attention_mask(torch.tensor([[0, 0, 1, 2]])).int()
        tensor([[[[1, 0, 0, 0],
                  [1, 1, 0, 0],
                  [1, 1, 1, 0],
                  [1, 1, 0, 1]]]], dtype=torch.int32)
    """
    width = segment_ids.shape[1]
    is_earlier = torch.ones(width, width, dtype=torch.bool, device=segment_ids.device).tril()
    key, query = segment_ids[:, None, None, :], segment_ids[:, None, :, None]
    return is_earlier & ((key == _COMMON) | (key == query))


def accept_packed_rows(model: Any) -> None:
    """Make a model with TRL's fused output layer accept a packed batch as the keyword ``packed``.

    Called with ``packed`` (see :func:`pack`) in addition to the unpacked rows' tensors and labels,
    the model computes the packed rows and returns TRL's output for the unpacked ones. Without it
    nothing changes. The model's forward is replaced, as TRL replaces it, so that wrappers (PEFT,
    DDP, FSDP, DeepSpeed), gradient checkpointing and autocast work unchanged.
    """
    unpacked_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, packed: dict[str, torch.Tensor] | None = None, **kwargs: Any) -> Any:
        if packed is None:
            return unpacked_forward(*args, **kwargs)
        inputs = {key: value for key, value in packed.items() if key not in _PACKING_KEYS}
        inputs["attention_mask"] = _model_mask(self, packed["segment_ids"])

        def keep_predictors(_module: Any, _args: Any, output: Any) -> Any:
            hidden_states = output.last_hidden_state  # (pairs, width, hidden size)
            rows = torch.arange(len(hidden_states), device=hidden_states.device)[:, None]
            output.last_hidden_state = hidden_states[rows, packed["predictor_index"]]  # (pairs, targets, hidden size)
            return output

        hook = self.base_model.register_forward_hook(keep_predictors)
        try:
            output = unpacked_forward(**inputs, shift_labels=packed["targets"], fused_lm_head=True)
        finally:
            hook.remove()
        return _unpack(output, packed["target_index"], kwargs["labels"][:, 1:] != -100)

    model.forward = MethodType(forward, model)


def _model_mask(model: Any, segment_ids: torch.Tensor) -> torch.Tensor:
    """Format the mask as the model's attention implementation expects it."""
    allowed = packed_attention_mask(segment_ids)
    if model.config.get_text_config()._attn_implementation == "sdpa":
        return allowed
    dtype = model.get_input_embeddings().weight.dtype
    additive = torch.zeros(allowed.shape, dtype=dtype, device=segment_ids.device)
    return additive.masked_fill(~allowed, torch.finfo(dtype).min)


def _unpack(output: Any, target_index: torch.Tensor, is_response: torch.Tensor) -> Any:
    """Arrange the fields of an output per target, (pairs, targets), as (2 * pairs, width - 1).

    Args:
        output: Output of TRL's fused output layer; its two-dimensional fields are arranged.
        target_index: Index of each response token's target, as :func:`pack` returns it.
        is_response: Whether each token of the unpacked rows, shifted by one, is a response token,
            of shape (2 * pairs, width - 1); other tokens get 0.
    """
    # The n-th response token of a row has the n-th entry of the row's target_index.
    order = (is_response.cumsum(dim=1) - 1).clamp(min=0)
    index = target_index.gather(1, order)

    def unpack(field: torch.Tensor) -> torch.Tensor:
        return field.repeat(2, 1).gather(1, index).masked_fill(~is_response, 0)

    fields = {key: unpack(value) for key, value in output.items() if value.dim() == 2}
    return type(output)(**fields)


def disable_vision_gradients(model: Any) -> None:
    """Compute the frozen modules before the language model without gradients, for known families.

    With gradient checkpointing the outputs of the embeddings require gradients, and the backward
    pass would go through a vision tower that is not trained.
    """
    family = family_of(model.config)
    if family.features == "never":
        return
    modules = {
        name: module for name, module in model.base_model.named_children() if not re.fullmatch(family.text_module, name)
    }
    trained = {name for name, module in modules.items() if any(p.requires_grad for p in module.parameters())}
    if trained <= set(family.projectors):
        for name in modules.keys() - trained:
            modules[name].forward = torch.no_grad()(modules[name].forward)
