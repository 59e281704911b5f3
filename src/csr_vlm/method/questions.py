"""Yes-or-no questions about what the policy says, answered by what suits the image.

Descriptions teach a policy to describe. Whether it also answers better when it is asked is
another matter: on the embedded world it does not. But a tree of candidates is full of
claims, and relevance has already told those that suit the image from those that do not.
Asked about one of them, the policy is to say yes or no accordingly. No label is needed, and
the false claims are the very things that this policy likes to make up. Claims made about
other images keep the policy from saying yes to what it would never have made up.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeVar

from csr_vlm.config.schema import QuestionsConfig
from csr_vlm.core.records import Node, Pair
from csr_vlm.method.reward import NOT_CANDIDATES, contrasts

_Item = TypeVar("_Item")
_SURE = (0.25, 0.5)
"""Shares of the best contrast below which a claim does not suit the image, and above which it does."""


@dataclass(frozen=True)
class Claims:
    """What one prompt's tree says that can be asked about."""

    sentences: dict[str, list[str]]
    """By question, the distinct sentences that claim what it asks."""
    strongest: dict[str, float]
    """By question, the best contrast of any of them."""
    best: float
    """The tree's best contrast."""

    def holds(self, contrast: float) -> bool:
        """Whether a claim with this contrast suits the image: it has more than half of the tree's best."""
        return contrast > _SURE[1] * self.best

    def fails(self, contrast: float) -> bool:
        """Whether it does not: it has less than a quarter. In between nothing is asked."""
        return contrast < _SURE[0] * self.best


def claims(nodes: Sequence[Node], config: QuestionsConfig, scorer: str) -> Claims:
    """Collect what ``config.pattern`` finds in the sentences of one prompt's tree.

    Raises:
        CsrError: The ledger has no cosines with other images.
    """
    pattern = re.compile(config.pattern)
    sentences = [node for node in nodes if node.sentence and node.status not in NOT_CANDIDATES]
    values = contrasts(sentences, scorer)
    found = Claims({}, {}, max(values.values(), default=0.0))
    for node in sentences:
        for match in pattern.finditer(node.sentence):
            question = config.ask(*match.groups())
            said = found.sentences.setdefault(question, [])
            if node.sentence not in said:
                said.append(node.sentence)
            found.strongest[question] = max(found.strongest.get(question, -2.0), values[node.node_id])
    return found


def negatives(own: Claims, pool: Iterable[str], number: int, key: str) -> list[str]:
    """Choose questions that other images gave rise to and this tree did not, by a keyed hash of their words."""
    strange = [question for question in pool if question not in own.sentences]
    return sorted(strange, key=lambda question: _digest(f"{key}:{question}"))[:number]


def questions(own: Claims, strange: Mapping[str, float], config: QuestionsConfig) -> list[tuple[str, bool]]:
    """List (question, whether the answer is yes) about one prompt's image.

    Yes is right for claims of the tree that hold; no for those that fail, and for claims
    that the tree never made, if they fail. What the policy never claimed and relevance likes
    all the same is left out: it is the scorer that errs more often there. No and yes take
    turns, and so do the two kinds of no; what is left of no or yes comes last, up to
    ``config.per_prompt``.

    Args:
        strange: Contrasts of claims that only other trees make, by question.
    """
    true = [(question, True) for question, value in own.strongest.items() if own.holds(value)]
    false = [[(q, False) for q, value in claimed.items() if own.fails(value)] for claimed in (own.strongest, strange)]
    turns = _in_turns(_in_turns(*false), true)
    return turns[: config.per_prompt]


def worth_asking(pairs: Sequence[Pair], config: QuestionsConfig, key: str) -> list[Pair]:
    """Keep the questions about one image if the policy does not answer all of them surely, or else mostly none.

    Surely: log P(right answer) - log P(wrong answer) >= ``config.sure``, in nats. What is
    known already would only be learnt to be said louder, at the cost of what descriptions
    teach; but asking nothing lets the answers drift, so a share of ``config.rehearsed`` of
    such images stays, by a keyed hash. All or none, since the sure yes beside an unsure no
    is what keeps no from becoming a habit.
    """
    sure = all(pair.chosen.logprob - pair.rejected.logprob >= config.sure for pair in pairs)
    drawn = int.from_bytes(_digest(key)[:8]) / 2**64
    return [] if sure and drawn >= config.rehearsed else list(pairs)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _in_turns(*lists: Sequence[_Item]) -> list[_Item]:
    """Merge lists by taking one of each at a time, as long as there are any."""
    return [item for row in zip_longest(*lists) for item in row if item is not None]
