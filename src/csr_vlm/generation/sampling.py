"""Choosing tokens so that a candidate depends on its own seed and nothing else."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def uniforms(seed: tuple[int | str, ...], length: int) -> np.ndarray:
    """Return the numbers in [0, 1) that a candidate's tokens are drawn with, of shape (length,)."""
    key = hashlib.sha256("\x1f".join(map(str, seed)).encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(key[:16], "little"))).random(length)


def sample(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Draw one token a row by inverting the cumulative distribution at ``uniform``.

    Unlike a shared generator this makes a row's token independent of the other rows.

    Args:
        logits: Of shape (rows, vocabulary); -inf bars a token.
        uniform: Of shape (rows,), in [0, 1).

    Returns:
        Token ids of shape (rows,).
    """
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    if top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token stays while the mass before it is below top_p, so the first always does.
        ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    cumulative = probabilities.cumsum(dim=-1)
    target = uniform.double().to(logits.device)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return tokens.clamp(max=logits.shape[-1] - 1)


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
