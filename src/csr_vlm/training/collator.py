"""Build the passes of a training step, with prompts encoded as in generation and responses as sampled token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from csr_vlm.core.records import Pair
from csr_vlm.models.encoding import image_tensors
from csr_vlm.models.passes import Block, join_blocks
from csr_vlm.models.policy import Policy
from csr_vlm.models.prefix_tree import row_tensors, target_index


class PairCollator:
    """Build what TRL's DPOTrainer computes on, pass by pass.

    Two pairs of one prompt, and one about the same image, give one row. With the prompts
    ``[1, 9, 5]`` and ``[1, 9, 6, 7]`` (9 stands for the image, 0 is padding), the pairs ::

        [
            {"prompt": "a", "chosen": [20, 21], "rejected": [20, 31], "logprobs": [-1.0, -2.0]},
            {"prompt": "a", "chosen": [20, 21, 8], "rejected": [40], "logprobs": [-1.5, -0.5]},
            {"prompt": "a?", "chosen": [50], "rejected": [51], "logprobs": [-0.5, -4.0]},
        ]

    become the pass ::

        {
            "input_ids": tensor([[0, 20, 21, 0],
                                 [0, 20, 21, 8],
                                 [0, 50, 0, 0],
                                 [0, 20, 31, 0],
                                 [0, 40, 0, 0],
                                 [0, 51, 0, 0]]),
            "completion_mask": tensor([[0, 1, 1, 0],
                                       [0, 1, 1, 1],
                                       [0, 1, 0, 0],
                                       [0, 1, 1, 0],
                                       [0, 1, 0, 0],
                                       [0, 1, 0, 0]]),
            "attention_mask": tensor([[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]]),
            "prompt_ids": ["a", "a", "a?"],
            "ref_chosen_logps": tensor([-1.0, -1.5, -0.5]),
            "ref_rejected_logps": tensor([-2.0, -0.5, -4.0]),
            "rows": {
                "input_ids": tensor([[1, 9, 5, 20, 21, 8, 31, 40, 6, 7, 50, 51]]),
                "position_ids": tensor([[0, 1, 2, 3, 4, 5, 4, 3, 2, 3, 4, 4]]),
                "ends": tensor([[12, 12, 8, 7, 6, 6, 7, 8, 12, 12, 11, 12]]),
                "targets": tensor([[20, 21, 8, 31, 40, 50, 51]]),
                "predictor_index": tensor([[2, 3, 4, 3, 2, 9, 9]]),
                "target_index": tensor([[0, 1, -1],
                                        [0, 1, 2],
                                        [5, -1, -1],
                                        [0, 3, -1],
                                        [4, -1, -1],
                                        [6, -1, -1]]),
                "pixel_values": tensor([[1.0]]),
            },
        }

    The first tensors are what TRL reads: a row per response, chosen rows first, without prompts; TRL
    counts the tokens of ``attention_mask``, which are those that the model computes. ``rows`` is what
    the model computes (:mod:`csr_vlm.models.prefix_tree`); ``pixel_values`` stands for all tensors
    that the processor makes of an image, which is in the batch once. The reference log-probabilities
    are sums over a response, in nats; ``prompt_ids`` serve error messages. Tokens that both responses of
    a pair begin with are left out of ``completion_mask`` and of the log-probabilities if the pair says
    so (``shared_tokens``): they cancel in DPO's loss, and the SFT term must not train on them.

    Args:
        policy: Policy that encodes the prompts.
        max_tokens: Token budget of a pass.
        sharing: Whether responses share tokens where the model allows it.
    """

    def __init__(self, policy: Policy, max_tokens: int, *, sharing: bool = True) -> None:
        self._policy = policy
        self._max_tokens = max_tokens
        self._sharing = sharing

    def passes(self, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
        """Build the passes of some pairs; those about one image must be adjacent to share it."""
        return [self._tensors(block, pairs) for block in join_blocks(self.blocks(pairs), self._max_tokens)]

    def blocks(self, pairs: Sequence[Pair]) -> list[Block]:
        """Arrange pairs in rows, which passes join."""
        blocks: list[Block] = []
        for numbers in _adjacent(pairs):
            encoded = {prompt: self._policy.encode(prompt) for prompt in {pairs[n].prompt: None for n in numbers}}
            units = [
                (n, [(encoded[pairs[n].prompt], r.token_ids) for r in (pairs[n].chosen, pairs[n].rejected)])
                for n in numbers
            ]
            blocks += self._policy.blocks(units, self._max_tokens, sharing=self._sharing)
        return blocks

    def _tensors(self, block: Block, pairs: Sequence[Pair]) -> dict[str, Any]:
        rows = row_tensors(block.rows, self._policy.pad_id)
        rows["target_index"] = target_index(block.rows, [*block.order(0), *block.order(1)])
        taken = [pairs[number] for number in block.units]
        is_token = torch.nn.functional.pad(rows["target_index"] >= 0, (1, 0))
        shared = torch.tensor([pair.shared_tokens for pair in taken] * 2)
        is_trained = is_token & (torch.arange(is_token.shape[1]) > shared[:, None])
        token_ids = rows["targets"].flatten()[rows["target_index"].clamp(min=0)]
        rows["target_index"].masked_fill_(~is_trained[:, 1:], -1)
        mask = rows.get("attention_mask")
        if mask is None:
            widths = torch.tensor([[len(row)] for row in block.rows])
            mask = (torch.arange(rows["input_ids"].shape[1]) < widths).long()
        return {
            "input_ids": torch.nn.functional.pad(token_ids, (1, 0)).masked_fill(~is_token, 0),
            "completion_mask": is_trained.long(),
            "attention_mask": mask,
            "prompt_ids": [pair.prompt.prompt_id for pair in taken],
            "ref_chosen_logps": torch.tensor([pair.chosen.logprob - pair.shared_logprob for pair in taken]),
            "ref_rejected_logps": torch.tensor([pair.rejected.logprob - pair.shared_logprob for pair in taken]),
            "rows": rows | image_tensors(block.images),
        }


def _adjacent(pairs: Sequence[Pair]) -> list[list[int]]:
    """Return the numbers of adjacent pairs about the same image."""
    groups: list[list[int]] = []
    for number, pair in enumerate(pairs):
        if number and pairs[number - 1].prompt.image == pair.prompt.image:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups
