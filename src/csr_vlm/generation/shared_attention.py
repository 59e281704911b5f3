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
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SPARE_TOKENS = 64
"""Extra tokens per slot to allocate whenever a :class:`KVCache` grows in length."""
TOKEN_MULTIPLE = 16
"""On a GPU a slot holds a multiple of this many tokens, since fused attention wants rows of its bias aligned."""
EFFICIENT_DEVICES = {"cuda"}
"""Types of device that have PyTorch's memory-efficient attention."""
ATTENTION = "csr_shared"
"""Name under which transformers finds :func:`shared_attention`."""


def is_gpu(device: torch.device) -> bool:
    """Return whether a device is anything but a CPU: launching an operation costs more there than padding."""
    return device.type != "cpu"


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
        self._flat_layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Every layer's keys and values as (slots * key heads * tokens, head size), views of the storage."""
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Every layer's keys and values as :meth:`layer` returns them, for ``_layers_shape``."""
        self._layers_shape = (0, 0)
        """(owners, width) of ``_layers``."""

    def insert(self, owner: Owner, kv: torch.Tensor) -> None:
        """Copy an owner's keys and values, of shape (layers, 2, key heads, tokens, head size), into a new slot."""
        layers, two, heads, length, size = kv.shape
        owner.slot = len(self.owners)
        self.reserve((layers, two, owner.slot + 1, heads, length, size), kv)
        self.owners.append(owner)
        self.lengths.append(length)
        self.data[:, :, owner.slot, :, :length].copy_(kv)

    def remove(self, owner: Owner) -> None:
        """Free an owner's slot and move the last slot's owner into the gap."""
        last = self.owners.pop()
        length = self.lengths.pop()
        if last is not owner:
            self.data[:, :, owner.slot, :, :length].copy_(self.data[:, :, last.slot, :, :length])
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
        if is_gpu(like.device):
            tokens += -tokens % TOKEN_MULTIPLE
        self._data = like.new_zeros((*shape[:2], slots, shape[3], tokens, shape[5]))
        if old is not None:
            self._data[:, :, : old.shape[2], :, : old.shape[4]].copy_(old)
        flat = self._data.view(*shape[:2], -1, shape[5])
        self._flat_layers = [_pair(layer) for layer in flat.unbind()]
        self._layers = []

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
        shape = len(self.owners), self.width
        if not self._layers or self._layers_shape != shape:
            self._layers = [_pair(layer) for layer in self.data[:, :, : shape[0], :, : shape[1]].unbind()]
            self._layers_shape = shape
        return self._layers[index]

    def flat_layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values, each of shape (slots * key heads * tokens, head size)."""
        return self._flat_layers[index]

    @property
    def width(self) -> int:
        """Return the number of tokens per slot to attend to: the longest owner's, or on a GPU the whole capacity.

        On a GPU a matrix product over a part of the capacity would copy that part first.
        """
        return self.data.shape[4] if is_gpu(self.data.device) else max(self.lengths)


def _pair(layer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = layer.unbind()
    return keys, values


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Copy one-dimensional arrays of integers to a device, in one transfer."""
    if not is_gpu(device):
        return [torch.from_numpy(array) for array in arrays]
    together = torch.from_numpy(np.concatenate(arrays)).to(device, non_blocking=True)
    return list(together.split([len(array) for array in arrays]))


def grid_of(owners: np.ndarray, columns: np.ndarray, num_owners: int) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Arrange rows as a grid of owners and columns.

    Args:
        owners: Owner of each row, of shape (rows,).
        columns: Column of each row, of shape (rows,).
        num_owners: Number of owners.

    Returns:
        ``row_of``, ``cell_of`` and ``shape`` of the :class:`RowLayout`.
    """
    width = int(columns.max()) + 1
    cell_of = owners * width + columns
    row_of = np.zeros(num_owners * width, dtype=np.int64)
    row_of[cell_of] = np.arange(len(cell_of))
    return row_of, cell_of, (num_owners, width)


@dataclass(frozen=True)
class RowLayout:
    """Arrange rows as a grid of (owners, width), so that an owner's rows meet its keys in one matrix product.

    The layout is made once a decoding step. Its indices name heads of rows, so that one operation a
    layer moves all rows into the grid, and one moves them back.
    """

    row_of: torch.Tensor
    """Row of each grid cell, of shape (owners * width,); an empty cell repeats row 0."""
    cell_of: torch.Tensor
    """Grid cell of each row, of shape (rows,)."""
    shape: tuple[int, int]
    """(owners, width)."""
    _indices: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    """Indices of :meth:`scatter` and :meth:`gather`, by what they depend on."""

    def scatter(self, rows: torch.Tensor, heads: int, key_heads: int) -> torch.Tensor:
        """Arrange (rows * heads, size) as (owners, key heads, width * heads per key head, size)."""
        owners, width = self.shape
        index = self._indices.get((heads, key_heads))
        if index is None:
            head = torch.arange(heads, device=rows.device).view(1, key_heads, 1, heads // key_heads)
            index = (self.row_of.view(owners, 1, width, 1) * heads + head).flatten()
            self._indices[heads, key_heads] = index
        return rows.index_select(0, index).view(owners, key_heads, -1, rows.shape[-1])

    def gather(self, cells: torch.Tensor, heads: int) -> torch.Tensor:
        """Invert :meth:`scatter`: map (owners, key heads, queries, size) to (rows * heads, size).

        ``cells`` must fill its memory without gaps; the order of its dimensions there is free.
        """
        size = cells.shape[-1]
        owner_stride, head_stride, query_stride, _ = cells.stride()
        key = (heads, *cells.shape, *cells.stride())
        index = self._indices.get(key)
        if index is None:
            key_heads = cells.shape[1]
            head = torch.arange(heads, device=cells.device)
            per_key = heads // key_heads
            offset = (head // per_key) * head_stride + (head % per_key) * query_stride
            owner, column = self.cell_of // self.shape[1], self.cell_of % self.shape[1]
            first = owner * owner_stride + column * per_key * query_stride
            index = ((first[:, None] + offset) // size).flatten()
            self._indices[key] = index
        return cells.as_strided((cells.numel() // size, size), (size, 1)).index_select(0, index)


@dataclass(frozen=True)
class CacheView:
    """Define which tokens of one cache the rows attend to in one step."""

    cache: KVCache[Any]
    layout: RowLayout
    masked: torch.Tensor | None
    """True where a grid cell must not attend, of shape (owners, 1 or width, tokens); None masks nothing."""
    siblings: SiblingLayout | None = None
    """Says the index of each stored token in its sequence; None counts from 0."""

    def attend(
        self, layer: int, query: torch.Tensor, heads: int, scale: float, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend to the cache.

        Args:
            layer: Index of the layer.
            query: Queries of shape (rows * heads, size).
            heads: Heads of the queries.
            scale: Factor of the scores.
            bias: Bias of the scores, from :meth:`bias`.

        Returns:
            The output of shape (rows * heads, size), and the log-sum-exp of the scores of shape
            (rows * heads, 1).
        """
        keys, values = self.cache.layer(layer)  # each (owners, key heads, width, size)
        output, log_sum_exp = attend(self.layout.scatter(query, heads, keys.shape[1]), keys, values, scale, bias)
        return self.layout.gather(output, heads), self.layout.gather(log_sum_exp[..., None], heads)

    def bias(self, earliest: torch.Tensor | None, heads: int) -> torch.Tensor | None:
        """Build the additive bias of the scores, of a shape that broadcasts to (owners, 1, queries, keys).

        Args:
            earliest: Index of the first token that each row may attend to, of shape (rows,); None for all tokens.
            heads: Heads of the queries.
        """
        keys, _ = self.cache.layer(0)
        masked = self.masked
        if earliest is not None:
            if self.siblings is None:
                index = torch.arange(keys.shape[2], device=keys.device)[None]
            else:
                index = self.siblings.token_index()
            first = earliest.index_select(0, self.layout.row_of).view(self.layout.shape)
            outside = index[:, None, :] < first[:, :, None]
            masked = outside if masked is None else masked | outside
        if masked is None:
            return None
        # Finite, so that a row with nothing visible here gets a log-sum-exp that vanishes beside any other.
        bias = torch.zeros(masked.shape, dtype=keys.dtype, device=keys.device)
        bias.masked_fill_(masked, torch.finfo(keys.dtype).min / 2)
        if bias.shape[1] > 1:
            bias = bias.repeat_interleave(heads // keys.shape[1], dim=1)
        return bias[:, None]


@dataclass
class DecodeStep:
    """Hold one decoding step of the live rows: where each row's token is stored and what it attends to.

    The step is passed through the model as the keyword ``decode_step``, which reaches
    :func:`shared_attention`. What all layers share is computed by the first of them.
    """

    prompts: CacheView
    groups: CacheView
    write_index: torch.Tensor
    """Where each row's keys go in a layer's flattened (slots * key heads * tokens), of shape (rows * key heads,)."""
    token_index: torch.Tensor
    """Index of each row's token in its sequence, of shape (rows,)."""
    last_token_index: int
    """Largest of ``token_index``, known without a read from the device."""
    _biases: dict[tuple[int, int], tuple[torch.Tensor | None, torch.Tensor | None]] = field(default_factory=dict)
    """Bias of the prompts' and of the groups' scores, by heads and sliding window."""

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
        rows, heads, size = query.shape
        for stored, new in zip(self.groups.cache.flat_layer(layer), (key, value), strict=True):
            stored.index_copy_(0, self.write_index, new.reshape(-1, size))
        prompt_bias, group_bias = self._bias(heads, sliding_window)
        flat = query.reshape(-1, size)
        prompt_output, prompt_lse = self.prompts.attend(layer, flat, heads, scale, prompt_bias)
        group_output, group_lse = self.groups.attend(layer, flat, heads, scale, group_bias)
        weight = torch.sigmoid(prompt_lse - group_lse).to(prompt_output.dtype)  # (rows * heads, 1)
        return _between(group_output, prompt_output, weight).view(rows, heads, size)

    def _bias(self, heads: int, sliding_window: int | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if sliding_window is None or self.last_token_index < sliding_window:
            sliding_window = 0
        biases = self._biases.get((heads, sliding_window))
        if biases is None:
            earliest = self.token_index - sliding_window + 1 if sliding_window else None
            biases = self.prompts.bias(earliest, heads), self.groups.bias(earliest, heads)
            self._biases[heads, sliding_window] = biases
        return biases


def _between(start: torch.Tensor, end: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute start + weight (end - start)."""
    if is_gpu(start.device):
        return torch.lerp(start, end, weight)
    return start + weight * (end - start)  # lerp rounds differently


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
        shape (owners, heads, queries or more).
    """
    # Both fused kernels read keys in place, however they are strided, and keep scores in float32.
    if not is_gpu(query.device):
        output, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, attn_mask=bias, scale=scale
        )
        return output, log_sum_exp
    if query.device.type in EFFICIENT_DEVICES:
        if bias is not None:
            bias = bias.expand(*query.shape[:-1], keys.shape[2])
        output, log_sum_exp, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, keys, values, bias, compute_log_sumexp=True, scale=scale
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
