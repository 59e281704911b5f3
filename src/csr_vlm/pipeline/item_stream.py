"""Search the prompts of several work items at once, so that the last prompts of an item leave no rows idle.

The next item is opened as soon as no prompt waits for rows, and an item ends with its last tree.
A tree depends on its own prompt alone, so it is the same whatever else is searched with it; in
half precision and on GPUs, log-probabilities are the same up to the rounding of other batch sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from csr_vlm.core.records import Prompt
from csr_vlm.method.search import Claims, Proposer, Score, ScoreClaims, Search, Tree


@dataclass
class OpenItem:
    """Hold a work item whose prompts are being searched."""

    item: int
    prompts: Sequence[Prompt]
    score: Score
    """Scores sentences against the negative images of this item."""
    score_claims: ScoreClaims | None
    ended: dict[str, Tree] = field(default_factory=dict)
    """Trees that have ended, by the id of their prompt."""

    @property
    def is_done(self) -> bool:
        """Return whether all trees have ended."""
        return len(self.ended) == len({prompt.prompt_id for prompt in self.prompts})

    def trees(self) -> list[Tree]:
        """Return the trees in the order of the prompts."""
        return [self.ended[prompt_id] for prompt_id in dict.fromkeys(prompt.prompt_id for prompt in self.prompts)]


_Value = TypeVar("_Value")
Begin = Callable[[Prompt, Score, ScoreClaims | None], tuple[Search, Proposer]]
"""Begins a search; the prompt is an example of those that will be added."""


class ItemStream:
    """Search work items as one stream.

    Args:
        begin: Begins a search.
    """

    def __init__(self, begin: Begin) -> None:
        self._begin = begin
        self._search: Search | None = None
        self._proposer: Proposer | None = None
        self._item_of: dict[str, OpenItem] = {}
        """Item by the id of each prompt of the open items."""

    def wants_item(self) -> bool:
        """Return whether another item should be opened now."""
        if self._search is None or self._proposer is None or self._search.is_idle:
            return True
        return self._proposer.wants_prompts()

    @property
    def is_idle(self) -> bool:
        """Return whether nothing is left to search."""
        return self._search is None or self._search.is_idle

    def add(self, opened: OpenItem) -> None:
        """Begin the trees of an item."""
        if self._search is None:
            claims = self._score_claims if opened.score_claims else None
            self._search, self._proposer = self._begin(opened.prompts[0], self._score, claims)
        self._item_of |= {prompt.prompt_id: opened for prompt in opened.prompts}
        self._search.add(opened.prompts)

    def step(self) -> Iterator[OpenItem]:
        """Grow trees until some are answered; yield the items that ended by it."""
        assert self._search is not None
        for tree in self._search.step():
            opened = self._item_of[tree.prompt.prompt_id]
            opened.ended[tree.prompt.prompt_id] = tree
            if opened.is_done:
                for prompt in opened.prompts:
                    self._item_of.pop(prompt.prompt_id, None)
                yield opened

    def abandon(self) -> list[OpenItem]:
        """Drop the search after an error; return the items that have not ended, in their order."""
        self._search = self._proposer = None
        opened = list({id(item): item for item in self._item_of.values()}.values())
        self._item_of.clear()
        return opened

    def _score(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        return self._by_item(items, lambda opened, own: [dict(row) for row in opened.score(own)])

    def _score_claims(self, items: Sequence[tuple[Prompt, str]]) -> list[Claims]:
        return self._by_item(items, lambda opened, own: list(opened.score_claims(own)) if opened.score_claims else [])

    def _by_item(
        self, items: Sequence[tuple[Prompt, str]], score: Callable[[OpenItem, list[tuple[Prompt, str]]], list[_Value]]
    ) -> list[_Value]:
        """Score (prompt, sentence) pairs, each with the other pairs of its work item; return the values in order."""
        places: dict[int, list[int]] = {}
        for place, (prompt, _) in enumerate(items):
            places.setdefault(self._item_of[prompt.prompt_id].item, []).append(place)
        values: dict[int, _Value] = {}
        for own in places.values():
            opened = self._item_of[items[own[0]][0].prompt_id]
            values |= dict(zip(own, score(opened, [items[place] for place in own]), strict=True))
        return [values[place] for place in range(len(items))]
