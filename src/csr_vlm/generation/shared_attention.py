"""Compute attention over keys and values that candidates share.

A candidate attends to tokens on three levels, none of which is copied per candidate:

1. its prompt, stored once for all candidates of the prompt;
2. its path (the sentences before), stored once for all siblings, the candidates that continue
   the same node;
3. its own tokens.

Levels 2 and 3 lie in one block per sibling group (:class:`SiblingLayout`), so a row attends
twice: to its prompt, and to its group's block with the other siblings' tokens masked. With q
the row's query, s the softmax scale, K and V the visible keys and values of level x::

    a_x = log sum_j exp(s q . K_xj)                             log-sum-exp of the scores
    o_x = sum_j exp(s q . K_xj - a_x) V_xj                      softmax attention within x
    o   = (exp(a_prompt) o_prompt + exp(a_block) o_block) / (exp(a_prompt) + exp(a_block))
        = o_block + sigmoid(a_prompt - a_block) (o_prompt - o_block)

which equals one softmax over all three levels. All live rows of all prompts run through the
model as one sequence of single tokens; :func:`shared_attention` replaces the model's attention
function and routes every row to its keys. Nothing depends on the order or the number of rows
beyond rounding.
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
"""Extra tokens per slot to allocate whenever a :class:`KVCache` grows in length."""
ATTENTION = "csr_shared"
"""Name under which transformers finds :func:`shared_attention`."""


class CacheOwner(Protocol):
    """Define what a :class:`KVCache` needs of the objects whose keys and values it stores."""

    slot: int
    """Index of the owner's slot; the cache updates it when it moves the data."""


Owner = TypeVar("Owner", bound=CacheOwner)


class KVCache(Generic[Owner]):
    """Store the keys and values of several owners, in slots without gaps.

    The storage is one tensor of shape (layers, 2, slots, key heads, tokens, head size); index 0
    of the second dimension holds keys, 1 values. It grows when it must and is reused afterwards.

    Args:
        max_owners: Most owners stored at once.
    """

    def __init__(self, max_owners: int) -> None:
        self._max_owners = max_owners
        self.owners: list[Owner] = []
        """Owner of each slot."""
        self.lengths: list[int] = []
        """Number of tokens in each slot."""
        self._data: torch.Tensor | None = None

    def insert(self, owner: Owner, kv: torch.Tensor) -> None:
        """Copy an owner's keys and values, of shape (layers, 2, key heads, tokens, head size), into a new slot."""
        layers, two, heads, length, size = kv.shape
        owner.slot = len(self.owners)
        self.reserve((layers, two, owner.slot + 1, heads, length, size), kv)
        self.owners.append(owner)
        self.lengths.append(length)
        self.data[:, :, owner.slot, :, :length] = kv

    def remove(self, owner: Owner) -> None:
        """Free an owner's slot and move the last slot's owner into the gap."""
        last = self.owners.pop()
        length = self.lengths.pop()
        if last is not owner:
            self.data[:, :, owner.slot, :, :length] = self.data[:, :, last.slot, :, :length]
            self.owners[owner.slot], self.lengths[owner.slot] = last, length
            last.slot = owner.slot

    def reserve(self, shape: tuple[int, ...], like: torch.Tensor) -> None:
        """Make the storage at least ``shape`` large, with the dtype and device of ``like``, and keep its content."""
        old = self._data
        if old is not None and all(have >= need for have, need in zip(old.shape, shape, strict=True)):
            return
        slots, tokens = shape[2], shape[4]
        if old is not None:
            # Allocate more than needed, so that growing step by step copies little.
            slots = old.shape[2] if slots <= old.shape[2] else min(slots + slots // 2, self._max_owners)
            tokens = old.shape[4] if tokens <= old.shape[4] else tokens + SPARE_TOKENS
        self._data = like.new_zeros((*shape[:2], slots, shape[3], tokens, shape[5]))
        if old is not None:
            self._data[:, :, : old.shape[2], :, : old.shape[4]] = old

    def set_lengths(self, lengths: list[int]) -> None:
        """Set the number of tokens of each slot; write the new tokens at :meth:`flat_index`."""
        layers, two, slots, heads, _, size = self.data.shape
        self.reserve((layers, two, slots, heads, max(lengths), size), self.data)
        self.lengths = lengths

    def flat_index(self, slots: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Index one token per row in a layer's flattened (slots * key heads * tokens).

        Args:
            slots: Slot of each row, of shape (rows,).
            tokens: Index of the token in its slot, of shape (rows,).

        Returns:
            Indices of shape (rows * key heads,).
        """
        heads, capacity = self.data.shape[3:5]
        head = torch.arange(heads, device=slots.device)
        return ((slots[:, None] * heads + head) * capacity + tokens[:, None]).flatten()

    def read(self, owner: Owner) -> torch.Tensor:
        """Return an owner's keys and values, of shape (layers, 2, key heads, tokens, head size)."""
        return self.data[:, :, owner.slot, :, : self.lengths[owner.slot]]

    @property
    def data(self) -> torch.Tensor:
        """Return the whole storage; only the first ``len(owners)`` slots are in use."""
        assert self._data is not None
        return self._data

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values, each of shape (owners, key heads, width, head size)."""
        keys, values = self.data[index, :, : len(self.owners), :, : self.width]
        return keys, values

    @property
    def width(self) -> int:
        """Return the number of tokens per slot to attend to: the longest owner's, or on a GPU the whole capacity.

        On a GPU a matrix product over a part of the capacity would copy that part first.
        """
        return max(self.lengths) if self.data.device.type == "cpu" else self.data.shape[4]


@dataclass(frozen=True)
class RowLayout:
    """Arrange rows as a grid of (owners, width), so that an owner's rows meet its keys in one matrix product."""

    row_of: torch.Tensor
    """Row of each grid cell, of shape (owners * width,); an empty cell repeats row 0."""
    cell_of: torch.Tensor
    """Grid cell of each row, of shape (rows,)."""
    shape: tuple[int, int]
    """(owners, width)."""

    @classmethod
    def of(cls, owners: np.ndarray, columns: np.ndarray, num_owners: int, device: torch.device) -> RowLayout:
        """Build the layout from each row's owner and column, both of shape (rows,)."""
        width = int(columns.max()) + 1
        cell_of = owners * width + columns
        row_of = np.zeros(num_owners * width, dtype=np.int64)
        row_of[cell_of] = np.arange(len(cell_of))
        return cls(torch.from_numpy(row_of).to(device), torch.from_numpy(cell_of).to(device), (num_owners, width))

    def scatter(self, rows: torch.Tensor, num_key_heads: int) -> torch.Tensor:
        """Arrange (rows, heads, size) as (owners, key heads, width * heads per key head, size)."""
        owners, width = self.shape
        cells = rows.index_select(0, self.row_of).view(owners, width, num_key_heads, -1, rows.shape[-1])
        return cells.transpose(1, 2).reshape(owners, num_key_heads, -1, rows.shape[-1])

    def gather(self, cells: torch.Tensor) -> torch.Tensor:
        """Invert :meth:`scatter`: (owners, key heads, width * heads per key head, size) to (rows, heads, size)."""
        owners, width = self.shape
        heads, size = cells.shape[1], cells.shape[-1]
        rows = cells.view(owners, heads, width, -1, size).transpose(1, 2)
        return rows.reshape(owners * width, -1, size).index_select(0, self.cell_of)


@dataclass(frozen=True)
class CacheView:
    """Define which tokens of one cache the rows attend to in one step."""

    cache: KVCache[Any]
    layout: RowLayout
    masked: torch.Tensor | None
    """True where a grid cell must not attend, of shape (owners, 1 or width, tokens); None masks nothing."""
    token_index: torch.Tensor | None = None
    """Index of each stored token in its sequence, of shape (owners, tokens); None counts from 0."""

    def attend(
        self, layer: int, query: torch.Tensor, scale: float, earliest: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend to the cache.

        Args:
            layer: Index of the layer.
            query: Queries of shape (rows, heads, size).
            scale: Factor of the scores.
            earliest: Index of the first token that each row may attend to, of shape (rows,);
                None for all tokens.

        Returns:
            The output of shape (rows, heads, size), and the log-sum-exp of the scores of shape
            (rows, heads, 1).
        """
        keys, values = self.cache.layer(layer)  # each (owners, key heads, width, size)
        heads = keys.shape[1]
        bias = self._bias(earliest, query.shape[1] // heads, keys)
        output, log_sum_exp = attend(self.layout.scatter(query, heads), keys, values, scale, bias)
        return self.layout.gather(output), self.layout.gather(log_sum_exp[..., None])

    def _bias(self, earliest: torch.Tensor | None, heads_per_key: int, keys: torch.Tensor) -> torch.Tensor | None:
        """Build the additive bias of the scores, of a shape that broadcasts to (owners, 1, queries, keys)."""
        masked = self.masked
        if earliest is not None:
            index = self.token_index
            if index is None:
                index = torch.arange(keys.shape[2], device=keys.device)[None]
            first = earliest.index_select(0, self.layout.row_of).view(self.layout.shape)
            outside = index[:, None, :] < first[:, :, None]
            masked = outside if masked is None else masked | outside
        if masked is None:
            return None
        # Finite, so that a row with nothing visible here gets a log-sum-exp that vanishes beside any other.
        bias = torch.zeros(masked.shape, dtype=keys.dtype, device=keys.device)
        bias.masked_fill_(masked, torch.finfo(keys.dtype).min / 2)
        if bias.shape[1] > 1:
            bias = bias.repeat_interleave(heads_per_key, dim=1)
        return bias[:, None]


@dataclass
class DecodeStep:
    """Hold one decoding step of the live rows: where each row's token is stored and what it attends to.

    The step is passed through the model as the keyword ``decode_step``, which reaches
    :func:`shared_attention`.
    """

    prompts: CacheView
    groups: CacheView
    write_index: torch.Tensor
    """Where each row's keys go in a layer's flattened (slots * key heads * tokens), of shape (rows * key heads,)."""
    token_index: torch.Tensor
    """Index of each row's token in its sequence, of shape (rows,)."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Store the rows' keys and values, then attend to prompt and group and merge both.

        Args:
            query: Queries of shape (rows, heads, size).
            key: Keys of shape (rows, key heads, size), as are the values.
            sliding_window: Most tokens that a row of this layer attends to; None for all.

        Returns:
            The output of shape (rows, heads, size).
        """
        self._store(layer, key, value)
        earliest = None
        if sliding_window is not None:
            first = self.token_index - sliding_window + 1
            earliest = first if bool((first > 0).any()) else None
        prompt_output, prompt_lse = self.prompts.attend(layer, query, scale, earliest)
        group_output, group_lse = self.groups.attend(layer, query, scale, earliest)
        weight = torch.sigmoid(prompt_lse - group_lse).to(prompt_output.dtype)  # (rows, heads, 1)
        return group_output + weight * (prompt_output - group_output)  # (rows, heads, size)

    def _store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        data = self.groups.cache.data[layer]  # (2, slots, key heads, tokens, size)
        for kind, rows in enumerate((key, value)):
            data[kind].view(-1, data.shape[-1]).index_copy_(0, self.write_index, rows.reshape(-1, rows.shape[-1]))


def padding_mask(lengths: Sequence[int], width: int, device: torch.device) -> torch.Tensor | None:
    """Mask the tokens after each owner's last, of shape (owners, 1, width); return None if there are none."""
    if min(lengths) == width:
        return None
    token = torch.arange(width, device=device)
    return token[None, None] >= torch.tensor(lengths, device=device)[:, None, None]


@dataclass(frozen=True)
class SiblingLayout:
    """Describe how the tokens of sibling groups lie in their cache slots.

    A slot holds the path, which all siblings attend to, then one token of each sibling per
    step, in turn: with a path P P and siblings a and b, P P a b a b. The fields have one entry
    per group.
    """

    prompt_lengths: Sequence[int]
    """Tokens of the prompt, which precede the slot's in the sequence."""
    path_lengths: Sequence[int]
    num_siblings: Sequence[int]
    lengths: Sequence[int]
    """Tokens stored in the slot."""
    width: int
    """Tokens of a slot that are attended to, stored or not."""
    device: torch.device

    def mask(self, num_columns: int) -> torch.Tensor:
        """Mask siblings' tokens from each other, and tokens not yet stored.

        Args:
            num_columns: Columns of the grid, at least the number of siblings of any group.

        Returns:
            True where sibling j of group g must not attend to token t: (groups, num_columns, width).
        """
        path, siblings, length = self._columns(self.path_lengths, self.num_siblings, self.lengths)
        token = torch.arange(self.width, device=self.device)
        after_path = (token - path)[:, None]
        sibling = torch.arange(num_columns, device=self.device)[:, None]
        is_own = (after_path % siblings[:, None] == sibling) & (token < length)[:, None]
        return ~((after_path < 0) | is_own)

    def token_index(self) -> torch.Tensor:
        """Compute each token's index in its sequence, of shape (groups, width)."""
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
        query: Queries of shape (owners, heads, queries, size).
        keys: Keys of shape (owners, heads, keys, size), as are the values.
        bias: Bias of a shape that broadcasts to (owners, 1, queries, keys).

    Returns:
        The output, of shape (owners, heads, queries, size), and the log-sum-exp in float32, of
        shape (owners, heads, queries).
    """
    if query.device.type == "cpu":
        # Reads keys in place, however they are strided, and keeps scores in float32.
        output, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, attn_mask=bias, scale=scale
        )
        return output, log_sum_exp
    scores = torch.matmul(query * scale, keys.transpose(-1, -2)).float()  # (owners, heads, queries, keys)
    if bias is not None:
        scores = scores + bias
    log_sum_exp = scores.logsumexp(dim=-1)  # (owners, heads, queries)
    weights = (scores - log_sum_exp[..., None]).exp_().to(values.dtype)
    return torch.matmul(weights, values), log_sum_exp


def shared_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    decode_step: DecodeStep | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as ``decode_step`` defines; without one, call PyTorch's scaled_dot_product_attention.

    Args:
        module: Attention layer; its ``layer_idx`` selects the layer of the caches.
        query: Queries of shape (1, heads, rows, size).
        key: Keys of shape (1, key heads, rows, size), as are the values.
        attention_mask: Mask, used only without a ``decode_step``.

    Returns:
        The output of shape (1, rows, heads, size), and None for the attention weights.

    Raises:
        NotImplementedError: The layer caps its scores or has an attention sink.
    """
    if decode_step is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return output, None
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("capped attention scores and attention sinks are not supported")
    rows = decode_step.attend(
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

    Its ordinary forward passes stay unchanged, provided they used PyTorch's attention.
    """
    AttentionInterface.register(ATTENTION, shared_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    decoder.set_attn_implementation(ATTENTION)
