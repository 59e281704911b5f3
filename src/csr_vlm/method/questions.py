"""Turn the claims of a policy's responses into yes-or-no questions, answered by image-text relevance.

Training on descriptions improves descriptions, but not the answers to questions: on the
embedded world it left these unchanged. A tree of candidate sentences contains many claims,
and relevance already separates those that suit the image from those that do not. The policy is
trained to answer questions about them accordingly, without any label; the false claims are the
hallucinations of this very policy. Claims about other images serve as negatives, so that the
policy does not learn to affirm what it would never have claimed itself.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeVar

from csr_vlm.config.schema import FROM_LEXICON, QuestionsConfig
from csr_vlm.core.records import Node, Pair
from csr_vlm.method.claims import claim_finder
from csr_vlm.method.reward import NOT_CANDIDATES, contrasts

_Item = TypeVar("_Item")
_FALSE_BELOW = 0.25
"""Fraction of the best contrast below which the image contradicts a claim."""
_TRUE_ABOVE = 0.5
"""Fraction of the best contrast above which the image supports a claim."""


@dataclass(frozen=True)
class Claims:
    """Hold the claims of one prompt's tree, by the question about each."""

    sentences: dict[str, list[str]]
    """Question to the distinct sentences that make the claim."""
    strongest: dict[str, float]
    """Question to the highest contrast of these sentences."""
    best: float
    """Highest contrast of the tree."""

    def is_supported(self, contrast: float) -> bool:
        """Return whether the image supports a claim with this contrast: more than half of the best."""
        return contrast > _TRUE_ABOVE * self.best

    def is_contradicted(self, contrast: float) -> bool:
        """Return whether the image contradicts a claim with this contrast: less than a quarter of the best."""
        return contrast < _FALSE_BELOW * self.best


def find_claims(nodes: Sequence[Node], config: QuestionsConfig, scorer: str, lexicon: str = "en") -> Claims:
    """Find the claims in the sentences of one prompt's tree.

    A claim is a thing of the lexicon, whatever its wording; or, with a pattern, each of its matches.

    Raises:
        CsrError: The ledger has no cosines with negative images, or the lexicon is not valid.
    """
    find = _finder(config.pattern, lexicon)
    sentences = [node for node in nodes if node.sentence and node.status not in NOT_CANDIDATES]
    values = contrasts(sentences, scorer)
    claims = Claims({}, {}, max(values.values(), default=0.0))
    for node in sentences:
        for groups in find(node.sentence):
            question = config.ask(*groups)
            wordings = claims.sentences.setdefault(question, [])
            if node.sentence not in wordings:
                wordings.append(node.sentence)
            claims.strongest[question] = max(claims.strongest.get(question, -2.0), values[node.node_id])
    return claims


def _finder(pattern: str, lexicon: str) -> Callable[[str], Iterable[tuple[str, ...]]]:
    """Return a function from a sentence to what fills the question about each of its claims."""
    if pattern == FROM_LEXICON:
        finder = claim_finder(lexicon)
        return lambda sentence: [(claim.name,) for claim in finder.find(sentence)]
    compiled = re.compile(pattern)
    return lambda sentence: [match.groups() for match in compiled.finditer(sentence)]


def negative_questions(claims: Claims, pool: Iterable[str], number: int, key: str) -> list[str]:
    """Choose questions that only other images gave rise to, by a keyed hash.

    Args:
        claims: Claims of the prompt's own tree.
        pool: Questions about the claims of all trees.
        number: Maximum number of questions.
        key: Key of the hash; the order of the pool has no influence.
    """
    candidates = [question for question in pool if question not in claims.sentences]
    return sorted(candidates, key=lambda question: _hash(f"{key}:{question}"))[:number]


def choose_questions(claims: Claims, negatives: Mapping[str, float], config: QuestionsConfig) -> list[tuple[str, bool]]:
    """Return up to ``config.per_prompt`` (question, whether the answer is yes) about one prompt's image.

    The answer is yes for claims of the tree that the image supports, and no for claims of the
    tree, or of other trees, that it contradicts. Nothing is asked about the others. A claim of
    another tree is never affirmed: where the policy did not make a claim but relevance is high,
    the scorer is usually wrong. No and yes alternate, as do the two kinds of no; the rest of
    the longer list comes last.

    Args:
        claims: Claims of the prompt's tree.
        negatives: Question about a claim that only other trees make, to its contrast here.
        config: Number of questions.
    """
    true = [(question, True) for question, value in claims.strongest.items() if claims.is_supported(value)]
    false = [
        [(question, False) for question, value in contrast_by_question.items() if claims.is_contradicted(value)]
        for contrast_by_question in (claims.strongest, negatives)
    ]
    return _alternate(_alternate(*false), true)[: config.per_prompt]


def drop_if_sure(pairs: Sequence[Pair], config: QuestionsConfig, key: str) -> list[Pair]:
    """Return the questions about one image, or none of them if the policy is sure of every answer.

    It is sure of an answer if log P(right) - log P(wrong) >= ``config.sure`` nats. Training on
    what it knows already would only amplify it, at the expense of the descriptions. But without
    any questions the answers drift, so a fraction of ``config.rehearsed`` of such images is
    kept, chosen by a keyed hash. Questions are kept or dropped together, because the sure yes
    beside an unsure no prevents a bias toward no.
    """
    is_sure = all(pair.chosen.logprob - pair.rejected.logprob >= config.sure for pair in pairs)
    uniform = int.from_bytes(_hash(key)[:8]) / 2**64
    return [] if is_sure and uniform >= config.rehearsed else list(pairs)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _alternate(*lists: Sequence[_Item]) -> list[_Item]:
    """Merge lists by taking one item of each in turn, until all are exhausted.

    Example:
        >>> _alternate([1, 2, 3], [10])
        [1, 10, 2, 3]
    """
    return [item for row in zip_longest(*lists) for item in row if item is not None]
