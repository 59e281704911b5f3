"""Arrange trees in passes: little padding, and every token attends to its own path alone."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from csr_vlm.models.encoding import EncodedPrompt
from csr_vlm.models.passes import Block, join_blocks, make_blocks, row_groups
from csr_vlm.models.prefix_tree import row_tensors, target_index, tree_mask

IMAGE = 9
Responses = list[tuple[list[int], list[int]]]
"""Token ids of both responses of some pairs."""


def prompt_of(number: int, length: int) -> EncodedPrompt:
    ids = torch.tensor([1, IMAGE, IMAGE, *range(100, 100 + length)])
    return EncodedPrompt(ids, torch.arange(len(ids)), {}, {"pixel_values": torch.full((1, 1), float(number))})


def blocks_of(
    prompts: list[EncodedPrompt], pairs: list[Responses], max_tokens: int, *, is_tree: bool = True
) -> list[Block]:
    blocks: list[Block] = []
    number = 0
    for prompt, some in zip(prompts, pairs, strict=True):
        units = [(number + index, [(prompt, side) for side in sides]) for index, sides in enumerate(some)]
        number += len(some)
        blocks += make_blocks(units, [IMAGE], max_tokens, 10_000, None, is_tree=is_tree)
    return blocks


responses = st.lists(st.integers(20, 23), min_size=1, max_size=6)
images = st.lists(st.lists(st.tuples(responses, responses), min_size=1, max_size=4), min_size=1, max_size=6)


@given(images, st.lists(st.integers(0, 30), min_size=6, max_size=6), st.sampled_from([1, 60, 8192]), st.booleans())
def test_every_response_is_predicted_from_its_own_path(
    pairs: list[Responses], lengths: list[int], max_tokens: int, is_tree: bool
) -> None:
    prompts = [prompt_of(number, length) for number, length in enumerate(lengths[: len(pairs)])]
    expected = [(prompt, sides) for prompt, some in zip(prompts, pairs, strict=True) for sides in some]
    seen: list[int] = []
    for block in join_blocks(blocks_of(prompts, pairs, max_tokens, is_tree=is_tree), max_tokens):
        seen += block.units
        batch = row_tensors(block.rows, pad_id=0)
        width = batch["input_ids"].shape[1]
        is_real = torch.arange(width) < torch.tensor([[len(row)] for row in block.rows])
        if is_tree:
            allowed = tree_mask(batch["ends"])[:, 0]
        else:
            allowed = torch.ones(width, width, dtype=torch.bool).tril() & is_real[:, None]
        for member in range(2):
            index = target_index(block.rows, block.order(member))
            for unit, (row, _), targets in zip(block.units, block.order(member), index, strict=True):
                prompt, sides = expected[unit]
                path = prompt.input_ids.tolist()
                for target, token in zip(targets[targets >= 0].tolist(), sides[member], strict=True):
                    assert batch["targets"][0, target] == token
                    found_row, column = divmod(int(batch["predictor_index"][0, target]), width)
                    assert found_row == row
                    attended = allowed[row, column] & is_real[row]
                    assert batch["input_ids"][row][attended].tolist() == path
                    assert batch["position_ids"][row][attended].tolist() == list(range(len(path)))
                    path.append(token)
        placed = [int(image.per_image["pixel_values"]) for image in block.images]
        in_rows = [(batch["input_ids"][row] == IMAGE).sum() for row in range(len(block.rows))]
        assert len(placed) == sum(in_rows) // 2
        assert block.num_tokens == batch["input_ids"].numel()
        assert block.num_targets == batch["targets"].numel()
        if is_tree:
            assert block.num_tokens <= 1.05 * sum(map(len, block.rows))
            assert len(block.units) == 1 or block.num_tokens <= max_tokens
    assert sorted(seen) == list(range(len(expected)))


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40))
def test_rows_hold_every_tree_once_and_waste_at_most_a_twentieth(lengths: list[int]) -> None:
    groups = row_groups(lengths)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert len(groups) * max(sum(lengths[i] for i in group) for group in groups) <= 1.05 * sum(lengths)


def test_trees_of_one_size_get_rows_of_their_own() -> None:
    assert row_groups([7] * 5) == [[0], [1], [2], [3], [4]]
    assert row_groups([600, 100, 100]) == [[0, 1, 2]]
    assert row_groups([600, 610, 590, 605]) == [[1], [3], [0], [2]]
