"""Arrange the responses of a step in passes through the model, within a budget of tokens.

A pass is a rectangle of rows, and what a row lacks to the width of the widest is padding. Trees differ in
size, so those of several images may share a row: a tree's tokens attend to nothing of another tree. With
trees of 5, 3 and 2 tokens::

    a a a a a        a a a a a
    b b b . .        b b b c c
    c c . . .

Longer rows cost more attention, so a pass has as many rows as waste at most a twentieth of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from csr_vlm.models.encoding import EncodedPrompt
from csr_vlm.models.prefix_tree import Continuation, PrefixTree, Row

_MAX_PADDING = 0.05
"""Largest share of padding in a pass of trees, relative to their tokens."""


@dataclass(frozen=True)
class Block:
    """Hold rows that are computed in one pass, with the units that they contain."""

    rows: tuple[Row, ...]
    units: tuple[int, ...]
    """Numbers of the units, such as pairs."""
    places: tuple[tuple[tuple[int, int], ...], ...]
    """For each unit, the row and the number in the row of each of its responses."""

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens, padding included."""
        return len(self.rows) * max(map(len, self.rows))

    @property
    def num_targets(self) -> int:
        """Return the number of distinct response tokens."""
        return sum(len(row.target_nodes) for row in self.rows)

    @property
    def is_tree(self) -> bool:
        """Return whether the rows are trees."""
        return self.rows[0].is_tree

    @property
    def images(self) -> list[EncodedPrompt]:
        """Return a prompt for each image in the rows, in their order."""
        return [image for row in self.rows for image in row.images]

    def order(self, member: int) -> list[tuple[int, int]]:
        """Return the places of the units' responses with a number, such as 0 for chosen."""
        return [unit[member] for unit in self.places]


def make_blocks(
    units: Sequence[tuple[int, Sequence[Continuation]]],
    image_token_ids: Sequence[int],
    max_tokens: int,
    max_targets: int,
    window: int | None,
    *,
    is_tree: bool,
) -> list[Block]:
    """Arrange units about one image in rows.

    Args:
        units: Number and responses of each unit; the responses of a unit stay in one block.
        image_token_ids: Token ids that stand for images.
        max_tokens: Token budget of a tree, which is exceeded only by a single unit.
        max_targets: The same for distinct response tokens.
        window: Longest path of a tree; units with longer ones get rows of their own.
        is_tree: Whether to share tokens; otherwise each response gets a row of its own.
    """
    blocks: list[Block] = []
    tree = PrefixTree(image_token_ids)
    numbers: list[int] = []
    places: list[tuple[tuple[int, int], ...]] = []

    def finish() -> None:
        if numbers:
            blocks.append(Block((tree.row(is_tree=True),), tuple(numbers), tuple(places)))

    for number, unit in units:
        longest = max(len(prompt.input_ids) + len(response) for prompt, response in unit)
        if not is_tree or (window is not None and longest > window):
            blocks.append(_separate_rows(number, unit, image_token_ids))
            continue
        num_targets = sum(len(response) for _, response in unit)
        num_new = tree.num_new_tokens(unit)
        if numbers and (len(tree) + num_new > max_tokens or tree.num_targets + num_targets > max_targets):
            finish()
            tree, numbers, places = PrefixTree(image_token_ids), [], []
        places.append(tuple((0, tree.num_responses + index) for index in range(len(unit))))
        numbers.append(number)
        for continuation in unit:
            tree.add(*continuation)
    finish()
    return blocks


def _separate_rows(number: int, unit: Sequence[Continuation], image_token_ids: Sequence[int]) -> Block:
    """Give each response of a unit a row of its own."""
    rows = []
    for continuation in unit:
        tree = PrefixTree(image_token_ids)
        tree.add(*continuation)
        rows.append(tree.row(is_tree=False))
    return Block(tuple(rows), (number,), (tuple((index, 0) for index in range(len(unit))),))


def join_blocks(blocks: Iterable[Block], max_tokens: int, max_targets: int | None = None) -> Iterator[Block]:
    """Join blocks to as few as the budgets of tokens, padding included, and of targets allow.

    Blocks of similar width are joined. A block over a budget remains alone.
    """
    joined: list[Block] = []
    for block in sorted(blocks, key=lambda block: (block.is_tree, max(map(len, block.rows)))):
        together = [*joined, block]
        num_targets = sum(other.num_targets for other in together)
        fits = _largest_size(together) <= max_tokens and (max_targets is None or num_targets <= max_targets)
        if joined and not (fits and block.is_tree == joined[0].is_tree):
            yield _pass_of(joined)
            joined = []
        joined.append(block)
    if joined:
        yield _pass_of(joined)


def _largest_size(blocks: Sequence[Block]) -> float:
    """Return the number of tokens, padding included, that a pass of some blocks has at most."""
    lengths = [len(row) for block in blocks for row in block.rows]
    padded = len(lengths) * max(lengths)
    return min(padded, (1 + _MAX_PADDING) * sum(lengths)) if blocks[0].is_tree else padded


def _pass_of(blocks: Sequence[Block]) -> Block:
    """Combine blocks; trees share rows where padding would be wasted."""
    rows = [row for block in blocks for row in block.rows]
    groups = row_groups([len(row) for row in rows]) if rows[0].is_tree else [[index] for index in range(len(rows))]
    place_of: dict[int, tuple[int, int]] = {}
    for number, group in enumerate(groups):
        first_response = 0
        for index in group:
            place_of[index] = number, first_response
            first_response += len(rows[index].responses)
    places: list[tuple[tuple[int, int], ...]] = []
    first_row = 0
    for block in blocks:
        for unit in block.places:
            new = [(place_of[first_row + row], index) for row, index in unit]
            places.append(tuple((row, first_response + index) for (row, first_response), index in new))
        first_row += len(block.rows)
    units = tuple(number for block in blocks for number in block.units)
    return Block(tuple(_one_row([rows[index] for index in group]) for group in groups), units, tuple(places))


def row_groups(lengths: Sequence[int]) -> list[list[int]]:
    """Divide trees among as many rows as waste at most a twentieth of the pass; return the trees of each row.

    Example:
        >>> row_groups([5, 3, 2])
        [[0], [1, 2]]
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    groups: list[list[int]] = []
    for num_rows in range(len(lengths), 0, -1):
        groups, filled = [[] for _ in range(num_rows)], [0] * num_rows
        for index in order:
            shortest = filled.index(min(filled))
            groups[shortest].append(index)
            filled[shortest] += lengths[index]
        if num_rows * max(filled) <= (1 + _MAX_PADDING) * sum(lengths):
            break
    return groups


def _one_row(rows: Sequence[Row]) -> Row:
    """Put trees one after the other into a row."""
    if len(rows) == 1:
        return rows[0]
    starts = [sum(len(row) for row in rows[:number]) for number in range(len(rows))]
    targets = [sum(len(row.target_nodes) for row in rows[:number]) for number in range(len(rows))]
    return Row(
        input_ids=torch.cat([row.input_ids for row in rows]),
        positions=torch.cat([row.positions for row in rows], dim=-1),
        per_token={key: torch.cat([row.per_token[key] for row in rows]) for key in rows[0].per_token},
        images=tuple(image for row in rows for image in row.images),
        ends=torch.cat([row.ends + start for row, start in zip(rows, starts, strict=True)]),
        target_nodes=torch.cat([row.target_nodes + start for row, start in zip(rows, starts, strict=True)]),
        predictors=torch.cat([row.predictors + start for row, start in zip(rows, starts, strict=True)]),
        responses=tuple(indices + first for row, first in zip(rows, targets, strict=True) for indices in row.responses),
        is_tree=True,
    )
