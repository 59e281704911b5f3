"""Choose tokens so that a candidate depends on its own seed and nothing else."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

BLOCK = 128
"""Vocabulary entries whose weights are summed together."""


def stream_key(seed: tuple[int | str, ...]) -> int:
    """Hash the name of a random stream to a number of 128 bits."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, seed)).encode()).digest()[:16], "little")


def uniforms(seed: tuple[int | str, ...], length: int) -> np.ndarray:
    """Return the numbers in [0, 1) that a candidate's tokens are drawn with, of shape (length,)."""
    return np.random.Generator(np.random.Philox(stream_key(seed))).random(length)


def sample(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Draw one token per row by inverting the cumulative distribution at ``uniform``.

    The token of row i is the smallest r with sum_{s <= r} p_i(s) > uniform_i, where
    p_i = softmax(logits_i / temperature), cut to the top-p nucleus (Holtzman et al. 2020) and
    renormalized. Unlike a shared generator this makes a row's token independent of the other rows.

    Args:
        logits: Logits of shape (rows, vocabulary); -inf excludes a token.
        uniform: Numbers of shape (rows,), in [0, 1).

    Returns:
        Token ids of shape (rows,).
    """
    weights = (logits / temperature).float()
    weights = weights.sub_(weights.amax(dim=-1, keepdim=True)).exp_()
    if top_p < 1.0:
        ordered, order = weights.double().sort(dim=-1, descending=True, stable=True)
        ordered /= ordered.sum(dim=-1, keepdim=True)
        # A token is kept while the mass before it is below top_p, so the first always is.
        dropped = ordered.cumsum(dim=-1) - ordered >= top_p
        weights.masked_fill_(torch.zeros_like(dropped).scatter(-1, order, dropped), 0.0)
    return _invert(weights, uniform.double().to(logits.device))


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Find where the running sum of a row's weights passes ``uniform`` of their total.

    Find the block of tokens first, then the token in it: a running sum over a large vocabulary
    in double precision would cost more than the model's output layer.
    """
    rows, vocabulary = weights.shape
    blocks = torch.nn.functional.pad(weights, (0, -vocabulary % BLOCK)).view(rows, -1, BLOCK)
    ends = blocks.sum(dim=-1).double().cumsum(dim=-1)  # (rows, blocks)
    target = _below(uniform * ends[:, -1], ends[:, -1])  # (rows,)
    block = torch.searchsorted(ends, target[:, None], right=True)  # (rows, 1)
    before = torch.nn.functional.pad(ends, (1, 0)).gather(-1, block)  # (rows, 1)
    inside = blocks.take_along_dim(block[..., None], dim=1).squeeze(1).double().cumsum(dim=-1)  # (rows, BLOCK)
    # Rounding may put the target at or past the block's end, where only tokens of weight 0 might be left.
    rest = _below(target[:, None] - before, inside[:, -1:])
    return (block * BLOCK + torch.searchsorted(inside, rest, right=True)).squeeze(-1)


def _below(value: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Clip values to the largest number below the limit."""
    return torch.minimum(value, torch.nextafter(limit, torch.zeros_like(limit)))


def choose_diverse(
    logits: torch.Tensor, group_ids: torch.Tensor, sibling_indices: torch.Tensor, penalty: float
) -> torch.Tensor:
    """Choose each row's best token after penalizing tokens that earlier siblings chose at this step.

    This is diverse beam search (Vijayakumar et al. 2018, arXiv 1610.02424) with Hamming diversity
    and groups of one beam: argmax_r log P(r) - penalty * #(earlier siblings that chose r at this step).

    Args:
        logits: Logits of shape (rows, vocabulary); -inf excludes a token.
        group_ids: Sibling group of each row, of shape (rows,).
        sibling_indices: Index among the siblings, of shape (rows,); lower ones choose first.

    Returns:
        Token ids of shape (rows,).
    """
    scores = torch.log_softmax(logits.float(), dim=-1)
    _, groups = torch.unique(group_ids, return_inverse=True)
    counts = torch.zeros(int(groups.max()) + 1, logits.shape[-1], device=logits.device)  # (groups, vocabulary)
    tokens = torch.empty_like(groups)
    for index in torch.unique(sibling_indices).tolist():
        rows = (sibling_indices == index).nonzero().squeeze(-1)
        tokens[rows] = (scores[rows] - penalty * counts[groups[rows]]).argmax(dim=-1)
        counts[groups[rows], tokens[rows]] += 1
    return tokens
