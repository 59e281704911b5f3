"""Arrange responses about one image as a prefix tree in one row, so that shared tokens are computed once.

The prompts and responses about an image begin alike: the image and its question are the same for
all pairs of a prompt, questions about the image share the image, and siblings share the sentences
before them. A row holds every distinct token once, in the order of a depth-first walk::

    tokens      <s> <img> <img> Why ?   There is a   red boat .   blue boat .
    positions    0    1     2   3   4     5   6  7    8   9   10    8    9  10
    ends        14   14    14  14  14    14  14 14   11  11   11   14   14  14

The descendants of token j are the tokens j + 1 .. ends[j] - 1, so token i attends to token j if
j <= i < ends[j]: to the tokens of its own path, at the positions of a row of its own. The output
layer is computed only where a response token is predicted, once per distinct token.

A model that cannot take such a mask computes rows of one response each with the same functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from csr_vlm.models.encoding import EncodedPrompt, extend, stack_padded
from csr_vlm.models.families import family_of

MAX_TOKENS = 8192
"""Default number of tokens, padding included, of one pass through the model."""
MAX_TARGETS = 1024
"""Response tokens of one pass whose logits are held at once, where no gradient is needed."""
MASKED_IMPLEMENTATIONS = ("sdpa", "eager")
"""Attention implementations that accept a mask of every token against every other."""
ROW_KEYS = frozenset({"ends", "targets", "predictor_index"})
"""Tensors of a batch of rows that are not inputs of the model."""

Continuation = tuple[EncodedPrompt, Sequence[int]]
"""A prompt and the token ids of a response to it."""


def tree_obstacle(config: Any) -> str | None:
    """Return why a model of this configuration cannot use prefix trees; None if it can."""
    text = config.get_text_config()
    if not family_of(config).causal:
        return f"{config.model_type} is not known to use strictly causal attention"
    if text._attn_implementation not in MASKED_IMPLEMENTATIONS:
        return f"the attention implementation {text._attn_implementation!r} accepts no custom mask"
    unsupported = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unsupported:
        return f"layers of type {min(unsupported)!r} accept no custom mask"
    if hasattr(text, "output_router_logits"):
        return "its experts are balanced over the tokens of separate rows"
    return None


def attention_window(config: Any) -> int | None:
    """Return the sliding window of the narrowest layer, in tokens; None where all layers attend to everything.

    A custom mask is the same for all layers, so a tree is exact if its longest path is within the window.
    """
    text = config.get_text_config()
    if "sliding_attention" in (getattr(text, "layer_types", None) or ["sliding_attention"]):
        return getattr(text, "sliding_window", None)
    return None


@dataclass(frozen=True)
class Row:
    """Hold one row of tokens: a prefix tree, or a prompt with one response."""

    input_ids: torch.Tensor
    """Token ids of shape (tokens,), in depth-first order."""
    positions: torch.Tensor
    """Token positions of shape (tokens,), or of shape (3, tokens) for M-RoPE."""
    per_token: dict[str, torch.Tensor]
    """Other tensors of shape (tokens,)."""
    images: tuple[EncodedPrompt, ...]
    """Prompts whose images the row contains, one per copy of the image."""
    ends: torch.Tensor
    """For each token, one more than the index of its last descendant; of shape (tokens,)."""
    target_nodes: torch.Tensor
    """Indices of the distinct response tokens, of shape (targets,)."""
    predictors: torch.Tensor
    """Index of the token that predicts each of them, of shape (targets,)."""
    responses: tuple[torch.Tensor, ...]
    """For each response, the indices of its tokens among the targets."""
    is_tree: bool
    """Whether the row needs the tree's mask."""

    def __len__(self) -> int:
        return len(self.input_ids)


class PrefixTree:
    """Build a row from prompts about one image and responses to them."""

    def __init__(self, image_token_ids: Iterable[int]) -> None:
        self._image_token_ids = torch.tensor(sorted(image_token_ids))
        self._children: dict[tuple[int, int], int] = {}
        self._parents: list[int] = []
        self._pieces: list[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]] = []
        self._prompt_ends: dict[int, int] = {}
        self._images: list[EncodedPrompt] = []
        self._paths: list[list[int]] = []

    @property
    def num_responses(self) -> int:
        """Return the number of responses that were added."""
        return len(self._paths)

    @property
    def num_targets(self) -> int:
        """Return an upper bound of the number of distinct response tokens."""
        return sum(len(path) for path in self._paths)

    def __len__(self) -> int:
        """Return the number of distinct tokens."""
        return len(self._parents)

    def num_new_tokens(self, unit: Sequence[Continuation]) -> int:
        """Return by how many tokens some responses would make the tree longer."""
        new: dict[tuple[int, int], int] = {}
        for prompt, response in unit:
            known_prompt = id(prompt) in self._prompt_ends
            node = self._prompt_ends[id(prompt)] if known_prompt else -1
            for token in response if known_prompt else (*prompt.input_ids.tolist(), *response):
                step = (node, token)
                if step not in self._children and step not in new:
                    new[step] = -2 - len(new)  # stands for a node that does not exist yet
                node = self._children[step] if step in self._children else new[step]
        return len(new)

    def add(self, prompt: EncodedPrompt, response: Sequence[int]) -> None:
        """Add a response.

        Raises:
            ValueError: The images of the prompts differ.
        """
        sequence = extend(prompt, response)
        if id(prompt) not in self._prompt_ends:
            self._prompt_ends[id(prompt)] = self._add_prompt(prompt)
        start = self._prompt_ends[id(prompt)]
        known = self._known(start, response)
        nodes = known + self._append(
            known[-1] if known else start, list(response), sequence, len(prompt.input_ids) + len(known)
        )
        self._paths.append(nodes)

    def _add_prompt(self, prompt: EncodedPrompt) -> int:
        """Add the tokens of a prompt; return the last one."""
        ids = prompt.input_ids.tolist()
        known = self._known(-1, ids)
        is_image = torch.isin(prompt.input_ids, self._image_token_ids)
        num_shared, num_image_tokens = int(is_image[: len(known)].sum()), int(is_image.sum())
        if num_shared == 0:
            self._images.append(prompt)
        elif num_shared < num_image_tokens:
            raise ValueError("prompts with different images cannot share a row")
        nodes = known + self._append(known[-1] if known else -1, ids, extend(prompt, ()), len(known))
        return nodes[-1]

    def _known(self, node: int, ids: Sequence[int]) -> list[int]:
        """Follow token ids from a node as far as the tree has them; return the nodes."""
        path: list[int] = []
        for token in ids:
            child = self._children.get((node, token))
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def _append(self, node: int, ids: Sequence[int], sequence: dict[str, torch.Tensor], start: int) -> list[int]:
        """Append the tokens of a sequence from ``start`` on as a chain below a node; return the new nodes."""
        num_new = sequence["input_ids"].shape[-1] - start
        if not num_new:
            return []
        first = len(self._parents)
        for token in ids[len(ids) - num_new :]:
            self._children[node, token] = len(self._parents)
            self._parents.append(node)
            node = len(self._parents) - 1
        others = {key: value[start:] for key, value in sequence.items() if key not in ("input_ids", "positions")}
        self._pieces.append((sequence["input_ids"][start:], sequence["positions"][..., start:], others))
        return list(range(first, first + num_new))

    def row(self, *, is_tree: bool) -> Row:
        """Return the row in depth-first order."""
        order = self._depth_first()
        index_of = {node: index for index, node in enumerate(order)}
        ends = list(range(1, len(order) + 1))
        for index in range(len(order) - 1, 0, -1):
            parent = self._parents[order[index]]
            if parent >= 0:
                ends[index_of[parent]] = max(ends[index_of[parent]], ends[index])
        targets = sorted({index_of[node] for path in self._paths for node in path})
        target_of = {index: number for number, index in enumerate(targets)}
        ids, positions, others = zip(*self._pieces, strict=True)
        permutation = torch.tensor(order)
        return Row(
            input_ids=torch.cat(ids)[permutation],
            positions=torch.cat(positions, dim=-1)[..., permutation],
            per_token={key: torch.cat([piece[key] for piece in others])[permutation] for key in others[0]},
            images=tuple(self._images),
            ends=torch.tensor(ends),
            target_nodes=torch.tensor(targets),
            predictors=torch.tensor([index_of[self._parents[order[index]]] for index in targets]),
            responses=tuple(torch.tensor([target_of[index_of[node]] for node in path]) for path in self._paths),
            is_tree=is_tree,
        )

    def _depth_first(self) -> list[int]:
        """Return the nodes so that the descendants of each follow it."""
        children: list[list[int]] = [[] for _ in self._parents]
        stack: list[int] = []
        for node, parent in enumerate(self._parents):
            (children[parent] if parent >= 0 else stack).append(node)
        stack.reverse()
        order: list[int] = []
        while stack:
            node = stack.pop()
            order.append(node)
            stack += reversed(children[node])
        return order


def row_tensors(rows: Sequence[Row], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right to one width.

    Returns:
        The model's inputs except images, of shape (rows, width), with ``position_ids`` of shape
        (3, rows, width) for M-RoPE; and

        - ``ends`` (rows, width) for trees, whose mask :func:`model_inputs_of` makes, or ``attention_mask``.
        - ``targets`` (1, targets): every distinct response token of all rows once.
        - ``predictor_index`` (1, targets): index in the flattened rows of the token that predicts it.
    """
    width = max(map(len, rows))
    batch = {
        "input_ids": stack_padded([row.input_ids for row in rows], width, pad_id),
        "position_ids": stack_padded([row.positions for row in rows], width, 0, dim=-2),
        "targets": torch.cat([row.input_ids[row.target_nodes] for row in rows])[None],
        "predictor_index": torch.cat([row.predictors + index * width for index, row in enumerate(rows)])[None],
    }
    if rows[0].is_tree:
        # Padding attends to itself only, since a softmax over nothing is undefined.
        batch["ends"] = torch.stack([torch.cat([row.ends, torch.arange(len(row), width) + 1]) for row in rows])
    else:
        batch["attention_mask"] = stack_padded([torch.ones_like(row.input_ids) for row in rows], width, 0)
    for key in rows[0].per_token:
        batch[key] = stack_padded([row.per_token[key] for row in rows], width, 0)
    return batch


def target_index(rows: Sequence[Row], order: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Return where the tokens of responses are among all targets of a batch, of shape (responses, tokens).

    Args:
        rows: Rows of the batch.
        order: Row and number in the row of each response.

    Returns:
        Indices into the ``targets`` of :func:`row_tensors`, padded with -1.
    """
    starts = [0, *accumulate(len(row.target_nodes) for row in rows)]
    indices = [starts[row] + rows[row].responses[number] for row, number in order]
    return torch.nn.utils.rnn.pad_sequence(indices, batch_first=True, padding_value=-1)


def tree_mask(ends: torch.Tensor) -> torch.Tensor:
    """Compute which tokens attend to which.

    Args:
        ends: One more than the index of each token's last descendant, of shape (rows, width).

    Returns:
        Booleans of shape (rows, 1, width, width): [b, 0, i, j] is whether i attends to j.

    Example:
        >>> tree_mask(torch.tensor([[4, 4, 3, 4]])).int()
        tensor([[[[1, 0, 0, 0],
                  [1, 1, 0, 0],
                  [1, 1, 1, 0],
                  [1, 1, 0, 1]]]], dtype=torch.int32)
    """
    index = torch.arange(ends.shape[1], device=ends.device)
    is_earlier = index[:, None] >= index[None, :]
    return (is_earlier & (index[None, :, None] < ends[:, None, :]))[:, None]


def model_inputs_of(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the model's inputs of a batch of rows, with the mask as its attention implementation expects it."""
    inputs = {key: value for key, value in batch.items() if key not in ROW_KEYS}
    if "ends" in batch:
        allowed = tree_mask(batch["ends"])
        if model.config.get_text_config()._attn_implementation != "sdpa":
            dtype = model.get_input_embeddings().weight.dtype
            additive = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
            inputs["attention_mask"] = additive.masked_fill(~allowed, torch.finfo(dtype).min)
        else:
            inputs["attention_mask"] = allowed
    return inputs


@contextmanager
def only_predictors(model: Any, predictor_index: torch.Tensor) -> Iterator[None]:
    """Make a model's output layer see only the hidden states that predict a target, (1, targets, width)."""

    def keep_predictors(_module: Any, _args: Any, output: Any) -> Any:
        hidden_states = output.last_hidden_state  # (rows, width, hidden size)
        output.last_hidden_state = hidden_states.flatten(0, 1)[predictor_index.to(hidden_states.device)]
        return output

    hook = model.base_model.register_forward_hook(keep_predictors)
    try:
        yield
    finally:
        hook.remove()
