"""Attention over keys and values that candidates share.

A candidate reads its prompt, the sentences before it and its own tokens. The prompt's keys
and values are stored once for all its candidates; those of the sentences before and of the
candidates themselves once for a family, that is for the siblings that continue the same
node. Nothing is copied to a row. Rows run through the model as one sequence of single
tokens, and attention looks up for each what it may see:

    o = (exp(a) A + exp(b) B) / (exp(a) + exp(b))

with A, a the output and the log-sum-exp of scores over the prompt, B, b those over the
family's block, which is exactly one softmax over both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SPARE_TOKENS = 64
ATTENTION = "csr_shared"
"""The name under which transformers finds :func:`shared_attention`."""


class Placed(Protocol):
    """Something whose keys and values lie in a :class:`Shelf`."""

    slot: int
    """Where; the shelf changes it when it moves them."""


Owner = TypeVar("Owner", bound=Placed)


class KVCache(Generic[Owner]):
    """Keys and values of several owners, in slots without gaps.

    Stored as one tensor of shape (layers, 2, slots, heads, tokens, head size) that grows
    when it must and is reused for what comes later.

    Args:
        most: Owners there can be at once.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.owners: list[Owner] = []
        self.lengths: list[int] = []
        self._data: torch.Tensor | None = None

    def put(self, owner: Owner, kv: torch.Tensor, room: int = 0) -> None:
        """Copy an owner's (layers, 2, heads, tokens, head size) in, with room for more tokens."""
        layers, two, heads, length, size = kv.shape
        owner.slot = len(self.owners)
        self.reserve((layers, two, owner.slot + 1, heads, length + room, size), kv)
        self.owners.append(owner)
        self.lengths.append(length)
        self.data[:, :, owner.slot, :, :length] = kv

    def take(self, owner: Owner) -> None:
        """Free an owner's slot; the last one moves into the gap."""
        last = self.owners.pop()
        length = self.lengths.pop()
        if last is not owner:
            self.data[:, :, owner.slot, :, :length] = self.data[:, :, last.slot, :, :length]
            self.owners[owner.slot], self.lengths[owner.slot] = last, length
            last.slot = owner.slot

    def reserve(self, shape: tuple[int, ...], like: torch.Tensor) -> None:
        """Make the storage at least this large; what is there stays."""
        old = self._data
        if old is not None and all(have >= need for have, need in zip(old.shape, shape, strict=True)):
            return
        slots, tokens = shape[2], shape[4]
        if old is not None:
            # More room than asked for, so that growing step by step copies little.
            slots = old.shape[2] if slots <= old.shape[2] else min(slots + slots // 2, self._most)
            tokens = old.shape[4] if tokens <= old.shape[4] else tokens + SPARE_TOKENS
        self._data = like.new_zeros((*shape[:2], slots, shape[3], tokens, shape[5]))
        if old is not None:
            self._data[:, :, : old.shape[2], :, : old.shape[4]] = old

    def lengthen(self, lengths: list[int]) -> None:
        """Say how many tokens the owners have now, slot by slot, the new ones to be written at :meth:`flat`."""
        layers, two, slots, heads, _, size = self.data.shape
        self.reserve((layers, two, slots, heads, max(lengths), size), self.data)
        self.lengths = lengths

    def flat(self, slots: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Index tokens in a layer's flattened (slots * heads * tokens), of shape (rows * heads,)."""
        heads, capacity = self.data.shape[3:5]
        head = torch.arange(heads, device=slots.device)
        return ((slots[:, None] * heads + head) * capacity + tokens[:, None]).flatten()

    def of(self, owner: Owner) -> torch.Tensor:
        """Return an owner's keys and values, of shape (layers, 2, heads, tokens, head size)."""
        return self.data[:, :, owner.slot, :, : self.lengths[owner.slot]]

    @property
    def data(self) -> torch.Tensor:
        """The whole storage; the first ``len(owners)`` slots mean something."""
        assert self._data is not None
        return self._data

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values, each of shape (owners, heads, width, head size)."""
        keys, values = self.data[index, :, : len(self.owners), :, : self.width]
        return keys, values

    @property
    def width(self) -> int:
        """Tokens of an owner to look at: up to the longest, or all there is room for.

        On a GPU a matrix product over a part of the room would copy that part first.
        """
        return max(self.lengths) if self.data.device.type == "cpu" else self.data.shape[4]


@dataclass(frozen=True)
class RowLayout:
    """Rows laid out as (owners, width), so that owners' rows meet their keys as one matrix."""

    row_of: torch.Tensor
    """Row in each cell, of shape (owners * width,); an empty cell repeats row 0."""
    cell_of: torch.Tensor
    """Cell of each row, of shape (rows,)."""
    shape: tuple[int, int]

    @classmethod
    def of(cls, owners: np.ndarray, columns: np.ndarray, num_owners: int, device: torch.device) -> RowLayout:
        """Lay rows out by their owner and column, each of shape (rows,)."""
        width = int(columns.max()) + 1
        cell_of = owners * width + columns
        row_of = np.zeros(num_owners * width, dtype=np.int64)
        row_of[cell_of] = np.arange(len(cell_of))
        return cls(torch.from_numpy(row_of).to(device), torch.from_numpy(cell_of).to(device), (num_owners, width))

    def spread(self, rows: torch.Tensor, num_key_heads: int) -> torch.Tensor:
        """Turn (rows, heads, size) into (owners, key heads, width * heads a key head, size)."""
        owners, width = self.shape
        cells = rows.index_select(0, self.row_of).view(owners, width, num_key_heads, -1, rows.shape[-1])
        return cells.transpose(1, 2).reshape(owners, num_key_heads, -1, rows.shape[-1])

    def gather(self, cells: torch.Tensor) -> torch.Tensor:
        """Turn (owners, key heads, width * heads a key head, size) back into (rows, heads, size)."""
        owners, width = self.shape
        heads, size = cells.shape[1], cells.shape[-1]
        rows = cells.view(owners, heads, width, -1, size).transpose(1, 2)
        return rows.reshape(owners * width, -1, size).index_select(0, self.cell_of)


@dataclass(frozen=True)
class CacheView:
    """What the rows see of one shelf in one step."""

    shelf: KVCache[Any]
    grid: RowLayout
    hidden: torch.Tensor | None
    """True where a cell may not look, of shape (owners, 1 or width, tokens); None if it may anywhere."""
    token_index: torch.Tensor | None = None
    """Place in its sequence of each stored token, of shape (owners, tokens); None counts from 0."""

    def attend(
        self, layer: int, query: torch.Tensor, scale: float, earliest: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend from (rows, heads, size), at most back to the ``earliest`` token of each row.

        Returns:
            The output of shape (rows, heads, size) and the log-sum-exp of the scores, (rows, heads, 1).
        """
        keys, values = self.shelf.layer(layer)
        heads = keys.shape[1]
        bias = self._bias(earliest, query.shape[1] // heads, keys)
        output, normaliser = attend(self.grid.spread(query, heads), keys, values, scale, bias)
        return self.grid.gather(output), self.grid.gather(normaliser[..., None])

    def _bias(self, earliest: torch.Tensor | None, repeats: int, keys: torch.Tensor) -> torch.Tensor | None:
        hidden = self.hidden
        if earliest is not None:
            index = (
                torch.arange(keys.shape[2], device=keys.device)[None]
                if self.token_index is None
                else (self.token_index)
            )
            first = earliest.index_select(0, self.grid.row_of).view(self.grid.shape)
            outside = index[:, None, :] < first[:, :, None]
            hidden = outside if hidden is None else hidden | outside
        if hidden is None:
            return None
        # Finite, so that a row that may see nothing here gets a log-sum-exp that vanishes beside any other.
        bias = torch.zeros(hidden.shape, dtype=keys.dtype, device=keys.device)
        bias.masked_fill_(hidden, torch.finfo(keys.dtype).min / 2)
        if bias.shape[1] > 1:
            bias = bias.repeat_interleave(repeats, dim=1)
        return bias[:, None]


@dataclass
class DecodeStep:
    """One step of the live rows: where each row's token goes and what it may see.

    Passed through the model as the keyword ``shared``, which reaches the attention function.
    """

    prompts: CacheView
    families: CacheView
    write_at: torch.Tensor
    """Where each row's own keys go in a layer's flattened (slots * heads * tokens), of shape (rows * heads,)."""
    index: torch.Tensor
    """Place of each row's token in its sequence, of shape (rows,)."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Store the rows' keys and values, and attend from (rows, heads, size); same shape out."""
        self._store(layer, key, value)
        earliest = None
        if sliding_window is not None:
            first = self.index - sliding_window + 1
            earliest = first if bool((first > 0).any()) else None
        over_prompt, a = self.prompts.attend(layer, query, scale, earliest)
        over_family, b = self.families.attend(layer, query, scale, earliest)
        weight = torch.sigmoid(a - b).to(over_prompt.dtype)
        return over_family + weight * (over_prompt - over_family)

    def _store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        data = self.families.shelf.data[layer]
        for kind, rows in enumerate((key, value)):
            data[kind].view(-1, data.shape[-1]).index_copy_(0, self.write_at, rows.reshape(-1, rows.shape[-1]))


def hidden_padding(lengths: Sequence[int], width: int, device: torch.device) -> torch.Tensor | None:
    """Hide the tokens after each owner's last, of shape (owners, 1, width); None if there are none."""
    if min(lengths) == width:
        return None
    token = torch.arange(width, device=device)
    return token[None, None] >= torch.tensor(lengths, device=device)[:, None, None]


@dataclass(frozen=True)
class Blocks:
    """How families' tokens lie: first the path, seen by all, then a token of each sibling a step, in turn."""

    prompt_lengths: Sequence[int]
    """Tokens that come before the block."""
    path_lengths: Sequence[int]
    num_siblings: Sequence[int]
    lengths: Sequence[int]
    width: int
    """Tokens there is room for."""
    device: torch.device

    def hidden(self, num_places: int) -> torch.Tensor:
        """Hide siblings' tokens from each other, and what is not written; (families, places, width)."""
        path, siblings, length = self._columns(self.path_lengths, self.num_siblings, self.lengths)
        token = torch.arange(self.width, device=self.device)
        after_path = (token - path)[:, None]
        place = torch.arange(num_places, device=self.device)[:, None]
        is_own = (after_path % siblings[:, None] == place) & (token < length)[:, None]
        return ~((after_path < 0) | is_own)

    def token_index(self) -> torch.Tensor:
        """Compute each token's place in its sequence, of shape (families, width)."""
        prompt, path, siblings = self._columns(self.prompt_lengths, self.path_lengths, self.num_siblings)
        token = torch.arange(self.width, device=self.device)
        after_path = token - path
        return prompt + torch.where(after_path < 0, token, path + after_path // siblings)

    def _columns(self, *numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, device=self.device)[..., None]


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute softmax(scale Q K^T + bias) V and the log-sum-exp of the scores.

    Args:
        query: Of shape (owners, heads, queries, size); keys and values (owners, heads, keys, size).
        bias: Of a shape that broadcasts to (owners, 1, queries, keys).

    Returns:
        The output, shaped like the query, and the log-sum-exp in float32, without the last dimension.
    """
    if query.device.type == "cpu":
        # Reads keys in place, however they are strided, and keeps scores in float32.
        output, normaliser = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, attn_mask=bias, scale=scale
        )
        return output, normaliser
    scores = torch.matmul(query * scale, keys.transpose(-1, -2)).float()
    if bias is not None:
        scores = scores + bias
    normaliser = scores.logsumexp(dim=-1)
    weights = (scores - normaliser[..., None]).exp_().to(values.dtype)
    return torch.matmul(weights, values), normaliser


def shared_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    shared: DecodeStep | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as a step says; without one, as PyTorch's scaled_dot_product_attention.

    Args:
        query: Of shape (1, heads, rows, size); key and value with key heads instead.

    Returns:
        The output of shape (1, rows, heads, size).
    """
    if shared is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
        return output, None
    if others.get("softcap") is not None or others.get("s_aux") is not None:
        raise NotImplementedError("scores that are capped or have a sink")
    rows = shared.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scaling if scaling is not None else query.shape[-1] ** -0.5,
        sliding_window,
    )
    return rows[None], None


def install(decoder: Any) -> None:
    """Make a language model attend through :func:`shared_attention`.

    Its ordinary forward passes stay what they were, if they used PyTorch's attention.
    """
    AttentionInterface.register(ATTENTION, shared_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    decoder.set_attn_implementation(ATTENTION)
