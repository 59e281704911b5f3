"""Turn the claims of a policy's responses into yes-or-no questions, answered by the evidence for them.

Training on descriptions improves descriptions, but not the answers to questions: on the
embedded world it left these unchanged. A tree of candidate sentences makes many claims, and the
evidence (:mod:`csr_vlm.method.claim_evidence`) separates those that suit the image from those that do
not. The policy is trained to answer questions about them accordingly, without any label; the
false claims are the hallucinations of this very policy. Claims about other images serve as
negatives, so that the policy does not learn to affirm what it would never have claimed itself.

A question is asked only where the odds of its answer, evidence and prior together, are clear:

    log odds(c) = e(c) + log prior odds        prior odds 3:1 if the policy made the claim, else 1:9
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import TypeVar

from csr_vlm.config.schema import QuestionsConfig
from csr_vlm.core.records import Pair

_Item = TypeVar("_Item")
_CLAIMED = math.log(3)
"""Prior log odds of a claim that the policy makes about an image: three in four are true."""
_UNCLAIMED = -math.log(9)
"""The same of a claim that it makes about other images only."""


def choose_unclaimed(claimed: Iterable[str], pool: Iterable[str], number: int, key: str) -> list[str]:
    """Choose things that the policy claims about other images only, by a keyed hash.

    Args:
        claimed: Things that it claims about this image.
        pool: Things that it claims about any image; their order has no influence.
        number: Maximum number of things.
        key: Key of the hash.
    """
    candidates = set(pool) - set(claimed)
    return sorted(candidates, key=lambda thing: _hash(f"{key}:{thing}"))[:number]


def choose_questions(
    claimed: Mapping[str, float], unclaimed: Mapping[str, float], config: QuestionsConfig, key: str
) -> list[tuple[str, bool]]:
    """Return up to ``config.per_prompt`` (question, whether the answer is yes) about one prompt's image.

    A claim of another image is never affirmed: where the policy did not make a claim but the
    evidence is strong, the scorer is usually wrong. No and yes alternate, as do the two kinds of
    no, and there are no more questions with yes than with no: most policies say yes too easily.

    Args:
        claimed: Things that the policy claims about the image, with the evidence in nats.
        unclaimed: Things that it claims about other images only, with the evidence on this one.
        config: Settings of the questions.
        key: Key of the hash that chooses each question's wording.
    """
    true = [(thing, True) for thing, nats in claimed.items() if clear_answer(nats, config) is True]
    false = [(thing, False) for thing, nats in claimed.items() if clear_answer(nats, config) is False]
    absent = [(thing, False) for thing, nats in unclaimed.items() if nats + _UNCLAIMED <= -config.min_log_odds]
    denied = _alternate(false, absent)
    chosen = _alternate(denied, true[: len(denied)])[: config.per_prompt]
    return [(_ask(thing, config, key), holds) for thing, holds in chosen]


def clear_answer(nats: float, config: QuestionsConfig) -> bool | None:
    """Return whether a thing that the policy claims is in the image, given the evidence; None if that is not clear."""
    log_odds = nats + _CLAIMED
    return log_odds > 0 if abs(log_odds) >= config.min_log_odds else None


def _ask(thing: str, config: QuestionsConfig, key: str) -> str:
    number = int.from_bytes(_hash(f"{key}:{thing}")[:8])
    return config.ask(thing, number % len(config.wordings))


def select_informative(pairs: Sequence[Pair], config: QuestionsConfig, key: str) -> list[Pair]:
    """Return the questions about one image that are worth training on.

    A question is dropped if the policy gives neither answer a probability of ``config.min_probability``:
    it does not answer this question by yes or no. All are dropped if the policy is sure of every
    answer, log P(right) - log P(wrong) >= ``config.sure`` nats: training on what it knows already
    would only amplify it, at the expense of the descriptions. But without any questions the answers
    drift, so a fraction of ``config.rehearsed`` of such images is kept, chosen by a keyed hash.
    Questions are kept or dropped together, because the sure yes beside an unsure no prevents a bias
    toward no.
    """
    answered = [pair for pair in pairs if is_answered(pair, config)]
    is_sure = all(pair.chosen.logprob - pair.rejected.logprob >= config.sure for pair in answered)
    uniform = int.from_bytes(_hash(key)[:8]) / 2**64
    return [] if is_sure and uniform >= config.rehearsed else answered


def is_answered(pair: Pair, config: QuestionsConfig) -> bool:
    """Return whether the policy gives yes or no a probability of ``config.min_probability``."""
    return max(pair.chosen.logprob, pair.rejected.logprob) >= math.log(config.min_probability)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _alternate(*lists: Sequence[_Item]) -> list[_Item]:
    """Merge lists by taking one item of each in turn, until all are exhausted.

    Example:
        >>> _alternate([1, 2, 3], [10])
        [1, 10, 2, 3]
    """
    return [item for row in zip_longest(*lists) for item in row if item is not None]
