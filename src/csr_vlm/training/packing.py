"""Both sides of a pair in one row, so that what they share is run once.

A packed row holds what chosen and rejected have in common (the picture, the question, and
the tokens they both begin with), then the rest of chosen, then the rest of rejected::

    tokens      <s> <img> <img> Why ?   There is a   red boat .   blue boat .
    positions    0    1     2   3   4     5   6  7    8   9   10    8    9  10
    part         0    0     0   0   0     0   0  0    1   1   1     2    2   2

A token attends to those before it of its own part and of part 0, so each side sees what it
would see in a row of its own, at the positions it would have there. The language model's
head reads only what predicts a response token, each such token once; what it says of them
is then laid out as TRL's DPOTrainer expects it, chosen rows first, then rejected. Losses
and metrics are TRL's own and do not know.
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

_SHARED, _CHOSEN, _REJECTED, _PADDING = range(4)
_MASKED_IMPLEMENTATIONS = ("sdpa", "eager")
"""Attention implementations that take a mask of every token against every other."""


def obstacle(config: Any) -> str | None:
    """Say why a model of this configuration cannot take packed rows; None if it can."""
    text = config.get_text_config()
    if not family_of(config).causal:
        return f"{config.model_type} is not known to attend strictly from left to right"
    if text._attn_implementation not in _MASKED_IMPLEMENTATIONS:
        return f"attention of the kind {text._attn_implementation!r} takes no mask of its own"
    strange = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if strange:
        return f"its layers of the kind {min(strange)!r} take no mask of their own"
    if hasattr(text, "output_router_logits"):
        return "its experts are balanced over the tokens of unpacked rows"
    return None


def window(config: Any) -> int | None:
    """Return how many tokens back the narrowest layer sees; None where all see everything.

    A mask of our own is the same for all layers, so it serves rows within that window only.
    """
    text = config.get_text_config()
    if "sliding_attention" in (getattr(text, "layer_types", None) or ["sliding_attention"]):
        return getattr(text, "sliding_window", None)
    return None


def num_shared(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """Count the tokens that both begin with."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(chosen), len(rejected)))


def pack(
    encoded: Sequence[EncodedPrompt], chosen: Sequence[Sequence[int]], rejected: Sequence[Sequence[int]], pad_id: int
) -> dict[str, torch.Tensor]:
    """Lay out pairs as packed rows, padded on the right.

    Args:
        encoded: A prompt a pair.
        chosen: The preferred response's token ids.
        rejected: The other's.

    Returns:
        The model's inputs of shape (pairs, width), positions counted in three dimensions
        (3, pairs, width); an image a pair; and

        - ``parts`` (pairs, width): 0 shared, 1 chosen, 2 rejected, 3 padding.
        - ``targets`` (pairs, slots): every response token once, -100 behind the last.
        - ``readers`` (pairs, slots): the place in the row that predicts it.
        - ``slots`` (2 * pairs, longest response): which slot each token of the unpacked
          responses has, chosen rows first.
    """
    shared = [num_shared(*both) for both in zip(chosen, rejected, strict=True)]
    responses = [[*left, *right[common:]] for left, right, common in zip(chosen, rejected, shared, strict=True)]
    batch = batch_rows(encoded, responses, pad_id, "right")
    parts = torch.full_like(batch["input_ids"], _PADDING)
    readers: list[torch.Tensor] = []
    slots: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for row, (item, left, right, common) in enumerate(zip(encoded, chosen, rejected, shared, strict=True)):
        start = len(item.input_ids)
        end = start + len(left)
        parts[row, : start + common] = _SHARED
        parts[row, start + common : end] = _CHOSEN
        parts[row, end : end + len(right) - common] = _REJECTED
        # Rejected goes on where the shared tokens end, not where chosen does.
        batch["position_ids"][..., row, end:] -= len(left) - common
        reads = torch.arange(len(responses[row])) + start - 1
        reads[len(left) : len(left) + 1] = start + common - 1
        readers.append(reads)
        slots[0].append(torch.arange(len(left)))
        own = torch.arange(len(right))
        slots[1].append(torch.where(own < common, own, own + len(left) - common))
    del batch["attention_mask"]
    batch |= {
        "parts": parts,
        "targets": _filled([torch.tensor(ids, dtype=torch.long) for ids in responses], -100),
        "readers": _filled(readers, 0),
        "slots": _filled(slots[0] + slots[1], 0),
    }
    return batch | image_tensors(encoded)


def _filled(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def visible(parts: torch.Tensor) -> torch.Tensor:
    """Tell which tokens see which.

    Args:
        parts: Of shape (pairs, width).

    Returns:
        Booleans of shape (pairs, 1, width, width): [b, 0, i, j] says that i sees j. Padding
        sees itself as well, since a softmax over nothing has no value.
    """
    width = parts.shape[1]
    earlier = torch.ones(width, width, dtype=torch.bool, device=parts.device).tril()
    seen, seeing = parts[:, None, None, :], parts[:, None, :, None]
    return earlier & ((seen == _SHARED) | (seen == seeing))


def read_packed_rows(model: Any) -> None:
    """Let a model that has TRL's fused head take a packed batch as well, under the name ``packed``.

    Called with ``packed`` (see :func:`pack`) beside the unpacked rows' own tensors and labels,
    the model runs the packed rows and returns TRL's output for the unpacked ones. Without it
    nothing changes. The model's forward is replaced, as TRL replaces it, so that wrappers
    (PEFT, DDP, FSDP, DeepSpeed), gradient checkpointing and autocast work as they do.
    """
    unpacked_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, packed: dict[str, torch.Tensor] | None = None, **kwargs: Any) -> Any:
        if packed is None:
            return unpacked_forward(*args, **kwargs)
        inputs = {key: value for key, value in packed.items() if key not in {"parts", "targets", "readers", "slots"}}
        inputs["attention_mask"] = _mask(self, packed["parts"])

        def keep_readers(_module: Any, _args: Any, output: Any) -> Any:
            hidden = output.last_hidden_state
            rows = torch.arange(len(hidden), device=hidden.device)[:, None]
            output.last_hidden_state = hidden[rows, packed["readers"]]
            return output

        hook = self.base_model.register_forward_hook(keep_readers)
        try:
            output = unpacked_forward(**inputs, shift_labels=packed["targets"], fused_lm_head=True)
        finally:
            hook.remove()
        return _unpacked(output, packed["slots"], kwargs["labels"][:, 1:] != -100)

    model.forward = MethodType(forward, model)


def _mask(model: Any, parts: torch.Tensor) -> torch.Tensor:
    """Word the mask as the model's attention takes it."""
    allowed = visible(parts)
    if model.config.get_text_config()._attn_implementation == "sdpa":
        return allowed
    dtype = model.get_input_embeddings().weight.dtype
    return torch.zeros(allowed.shape, dtype=dtype, device=parts.device).masked_fill(~allowed, torch.finfo(dtype).min)


def _unpacked(output: Any, slots: torch.Tensor, answers: torch.Tensor) -> Any:
    """Lay out what is known of each slot as (2 * pairs, width - 1), zero where no response token is predicted."""
    # The n-th response token of a row takes the n-th of its slots.
    order = (answers.cumsum(dim=1) - 1).clamp(min=0)
    places = slots.gather(1, order)

    def laid_out(field: torch.Tensor) -> torch.Tensor:
        return field.repeat(2, 1).gather(1, places).masked_fill(~answers, 0)

    fields = {key: laid_out(value) for key, value in output.items() if value.dim() == 2}
    return type(output)(**fields)


def freeze_pictures(model: Any) -> None:
    """Compute without gradients what a known family has before its language model, where it does not train.

    With gradient checkpointing the embeddings' outputs ask for gradients, and the backward
    pass would go through a vision tower that takes none.
    """
    family = family_of(model.config)
    if family.features == "never":
        return
    parts = {
        name: part for name, part in model.base_model.named_children() if not re.fullmatch(family.text_module, name)
    }
    trained = {name for name, part in parts.items() if any(p.requires_grad for p in part.parameters())}
    if trained <= set(family.projectors):
        for name in parts.keys() - trained:
            parts[name].forward = torch.no_grad()(parts[name].forward)
