"""Yes-or-no questions about what the policy itself said, answered by what suits the image.

Descriptions teach a policy to describe. Whether it also answers better when it is asked is
another matter: on the embedded world it does not. But a tree of candidates is full of
claims, and relevance has already told those that suit the image from those that do not.
Asked about one of them, the policy is to say yes or no accordingly. No label is needed, and
the false claims are the very things that this policy likes to make up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from csr_vlm.config import QuestionsConfig
from csr_vlm.method.reward import OUT_OF_THE_RUNNING, contrasts
from csr_vlm.records import Node

_SURE = (0.25, 0.5)
"""Shares of the best contrast below which a claim does not suit the image, and above which it does."""


def questions(nodes: Sequence[Node], config: QuestionsConfig, scorer: str) -> list[tuple[str, bool]]:
    """List (question, whether the answer is yes) about the claims in one prompt's tree.

    A claim is what ``config.pattern`` finds in a sentence. It holds if any sentence with it
    has more than half of the tree's best contrast, and does not if none has more than a
    quarter; in between nothing is asked. No and yes take turns, and what is left of either
    comes last, up to ``config.per_prompt``.

    Raises:
        CsrError: The ledger has no cosines with other images.
    """
    pattern = re.compile(config.pattern)
    sentences = [node for node in nodes if node.sentence and node.fate not in OUT_OF_THE_RUNNING]
    values = contrasts(sentences, scorer)
    best = max(values.values(), default=0.0)
    strongest: dict[str, float] = {}
    for node in sentences:
        for found in pattern.finditer(node.sentence):
            question = config.question.format(*found.groups())
            strongest[question] = max(strongest.get(question, -2.0), values[node.node_id])
    false = [(question, False) for question, value in strongest.items() if value < _SURE[0] * best]
    true = [(question, True) for question, value in strongest.items() if value > _SURE[1] * best]
    turns = [pair for both in zip(false, true, strict=False) for pair in both]
    rest = false[len(true) :] + true[len(false) :]
    return (turns + rest)[: config.per_prompt]
