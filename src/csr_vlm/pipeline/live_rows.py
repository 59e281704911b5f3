"""Simulate how many rows decode at once in a search, without a model.

The scheduler admits the rows of a partial response together and waits for all sentences of a prompt before it continues
the prompt, so a budget of 80 rows is not kept busy by the prompts whose full beams have 80 rows; and at the end of a
work item, or of a stream of them, rows run empty.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from functools import cache


@dataclass(frozen=True)
class SearchShape:
    """Hold what the number of live rows depends on."""

    candidates: int
    beam: int
    """Partial responses that are continued in every round but the first."""
    prompts: int
    """Prompts of a work item, or of a stream of them."""
    max_rows: int
    max_prompts: int
    """Most prompts in progress."""
    sentences: tuple[int, int]
    """Fewest and most sentences of a response."""
    tokens: tuple[int, int]
    """Fewest and most tokens of a sentence."""


@dataclass(frozen=True)
class LiveRows:
    """Hold what one prompt costs on average."""

    tokens: float
    """Decoded tokens of all its candidates."""
    steps: float
    """Decoding steps, shared with the other prompts in progress."""
    sentences: float
    """Candidates."""
    prompts: float
    """Mean number of prompts in progress."""

    @property
    def rows(self) -> float:
        """Return the mean number of rows that decode at once."""
        return self.tokens / self.steps


@dataclass
class _Prompt:
    rounds: int
    groups: int = 0
    """Groups of the current round that have not ended."""
    waiting: list[list[int]] = field(default_factory=list)


@cache
def simulate(shape: SearchShape) -> LiveRows:
    """Simulate one work item with a fixed seed: prompts with a uniform number of sentences of uniform length.

    A finished prompt's place is taken by the next of the same item; a round starts when the last sentence of the
    one before has ended. The beam stays full until a prompt's last round.
    """
    random_numbers = random.Random(0)
    queue: deque[_Prompt] = deque(_Prompt(random_numbers.randint(*shape.sentences)) for _ in range(shape.prompts))
    active: list[_Prompt] = []
    live: list[tuple[_Prompt, list[int]]] = []
    tokens = steps = sentences = prompt_steps = 0

    def begin_round(prompt: _Prompt, groups: int) -> None:
        prompt.groups = groups
        prompt.waiting = [
            [random_numbers.randint(*shape.tokens) for _ in range(shape.candidates)] for _ in range(groups)
        ]

    while queue or active:
        while queue and len(active) < shape.max_prompts:
            active.append(queue.popleft())
            begin_round(active[-1], 1)
        rows = sum(len(group) for _, group in live)
        for prompt in active:
            while prompt.waiting and (not live or rows + shape.candidates <= shape.max_rows):
                live.append((prompt, prompt.waiting.pop()))
                rows += shape.candidates
                sentences += shape.candidates
        tokens, steps, prompt_steps = tokens + rows, steps + 1, prompt_steps + len(active)
        remaining: list[tuple[_Prompt, list[int]]] = []
        for prompt, group in live:
            left = [length - 1 for length in group if length > 1]
            if left:
                remaining.append((prompt, left))
                continue
            prompt.groups -= 1
            if not prompt.groups:
                prompt.rounds -= 1
                if prompt.rounds > 0:
                    begin_round(prompt, shape.beam)
        live = remaining
        active = [prompt for prompt in active if prompt.rounds > 0]
    number = shape.prompts
    return LiveRows(tokens / number, steps / number, sentences / number, prompt_steps / steps)
