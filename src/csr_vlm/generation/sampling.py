"""Choosing tokens so that a candidate depends on its own seed and nothing else."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

BLOCK = 128
"""Tokens of the vocabulary looked at together."""


def stream_key(seed: tuple[int | str, ...]) -> int:
    """Map the name of a random stream to a number of 128 bits."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, seed)).encode()).digest()[:16], "little")


def uniforms(seed: tuple[int | str, ...], length: int) -> np.ndarray:
    """Return the numbers in [0, 1) that a candidate's tokens are drawn with, of shape (length,)."""
    return np.random.Generator(np.random.Philox(stream_key(seed))).random(length)


def sample(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Draw one token a row by inverting the cumulative distribution at ``uniform``.

    Unlike a shared generator this makes a row's token independent of the other rows.

    Args:
        logits: Of shape (rows, vocabulary); -inf bars a token.
        uniform: Of shape (rows,), in [0, 1).

    Returns:
        Token ids of shape (rows,).
    """
    weights = (logits / temperature).float()
    weights = weights.sub_(weights.amax(dim=-1, keepdim=True)).exp_()
    if top_p < 1.0:
        ordered, order = weights.double().sort(dim=-1, descending=True, stable=True)
        ordered /= ordered.sum(dim=-1, keepdim=True)
        # A token stays while the mass before it is below top_p, so the first always does.
        out = ordered.cumsum(dim=-1) - ordered >= top_p
        weights.masked_fill_(torch.zeros_like(out).scatter(-1, order, out), 0.0)
    return _invert(weights, uniform.double().to(logits.device))


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Find where the running sum of a row's weights passes ``uniform`` of their total.

    First the block of tokens, then the token in it: a running sum over a large vocabulary
    in double precision would cost more than the model's last layer.
    """
    rows, vocabulary = weights.shape
    blocks = torch.nn.functional.pad(weights, (0, -vocabulary % BLOCK)).view(rows, -1, BLOCK)
    ends = blocks.sum(dim=-1).double().cumsum(dim=-1)
    target = _below(uniform * ends[:, -1], ends[:, -1])
    block = torch.searchsorted(ends, target[:, None], right=True)
    before = torch.nn.functional.pad(ends, (1, 0)).gather(-1, block)
    inside = blocks.take_along_dim(block[..., None], dim=1).squeeze(1).double().cumsum(dim=-1)
    # Rounding may put the target at or past the block's end, where only tokens of no weight might be left.
    rest = _below(target[:, None] - before, inside[:, -1:])
    return (block * BLOCK + torch.searchsorted(inside, rest, right=True)).squeeze(-1)


def _below(value: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    return torch.minimum(value, torch.nextafter(limit, torch.zeros_like(limit)))


def diverse(logits: torch.Tensor, family: torch.Tensor, place: torch.Tensor, penalty: float) -> torch.Tensor:
    """Choose each row's best token after penalising those that earlier siblings chose now.

    This is diverse beam search (Vijayakumar et al. 2018) with Hamming diversity and
    groups of one beam: log P(r) - penalty * #(earlier siblings that chose r at this step).

    Args:
        logits: Of shape (rows, vocabulary).
        family: Index of the parent, of shape (rows,).
        place: Index among the siblings, of shape (rows,).

    Returns:
        Token ids of shape (rows,).
    """
    scores = torch.log_softmax(logits.float(), dim=-1)
    _, compact = torch.unique(family, return_inverse=True)
    taken = torch.zeros(int(compact.max()) + 1, logits.shape[-1], device=logits.device)
    tokens = torch.empty_like(compact)
    for number in torch.unique(place).tolist():
        rows = (place == number).nonzero().squeeze(-1)
        tokens[rows] = (scores[rows] - penalty * taken[compact[rows]]).argmax(dim=-1)
        taken[compact[rows], tokens[rows]] += 1
    return tokens
