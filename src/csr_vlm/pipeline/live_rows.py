"""Simulate how many rows decode at once in a search, without a model.

The scheduler admits the rows of a partial response together and waits for all sentences of a prompt before it continues
the prompt, so a budget of 80 rows is not kept busy by the prompts whose full beams have 80 rows; and at the end of a
work item, or of a stream of them, rows run empty.
"""

from __future__ import annotations

import heapq
import random
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from itertools import count


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
    prompts = [_Prompt(random_numbers.randint(*shape.sentences)) for _ in range(shape.prompts)]
    waiting: list[int] = []  # a heap of the prompts with groups that are not admitted
    ending: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)  # by step, prompt and group of every last token
    rows_left: list[int] = []  # by group
    begun = active = rows = tokens = steps = prompt_steps = 0

    def begin_round(number: int, groups: int) -> None:
        prompts[number].groups = groups
        prompts[number].waiting = [
            [random_numbers.randint(*shape.tokens) for _ in range(shape.candidates)] for _ in range(groups)
        ]
        heapq.heappush(waiting, number)

    while begun < shape.prompts or active:
        while begun < shape.prompts and active < shape.max_prompts:
            begin_round(begun, 1)
            begun, active = begun + 1, active + 1
        while waiting and (not rows or rows + shape.candidates <= shape.max_rows):
            number = waiting[0]
            for length in prompts[number].waiting.pop():
                ending[steps + length].append((len(rows_left), number))
            rows_left.append(shape.candidates)
            rows += shape.candidates
            if not prompts[number].waiting:
                heapq.heappop(waiting)
        passed = next(n for n in count(1) if steps + n in ending)  # until then nothing changes
        tokens, steps, prompt_steps = tokens + rows * passed, steps + passed, prompt_steps + active * passed
        ended = ending.pop(steps)
        rows -= len(ended)
        for group, _ in ended:
            rows_left[group] -= 1
        for _, number in sorted({row for row in ended if not rows_left[row[0]]}):
            prompt = prompts[number]
            prompt.groups -= 1
            if not prompt.groups:
                prompt.rounds -= 1
                if prompt.rounds > 0:
                    begin_round(number, shape.beam)
                else:
                    active -= 1
    total = shape.prompts
    return LiveRows(tokens / total, steps / total, len(rows_left) * shape.candidates / total, prompt_steps / steps)
