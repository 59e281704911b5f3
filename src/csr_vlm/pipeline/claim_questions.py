"""Pairs of yes and no from an iteration's own ledger (``method.pairs.questions``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from csr_vlm.config.schema import RunConfig
from csr_vlm.core.records import Node, Pair, Prompt
from csr_vlm.data.external_pairs import TextPair
from csr_vlm.method.questions import choose_questions, drop_if_sure, find_claims, negative_questions
from csr_vlm.method.reward import contrast
from csr_vlm.method.sentences import SentenceRule

if TYPE_CHECKING:
    from csr_vlm.models.policy import Policy
    from csr_vlm.scoring.scorer import ScorerGroup

_WORDINGS = 8
"""Sentences that speak for a claim where it was not made."""


class ClaimQuestioner:
    """Asks a policy about the claims of its trees, a group of prompts at a time.

    Args:
        config: What is asked; it may differ from the run's.
        policy: The one that made the ledger; the log-probabilities are its own.
        company: Prompts whose images stand in where a group is too small to have others.
    """

    def __init__(
        self, config: RunConfig, policy: Policy, scorer: ScorerGroup, iteration: int, filler_prompts: Sequence[Prompt]
    ) -> None:
        self._config = config
        self._policy = policy
        self._scorer = scorer
        self._iteration = iteration
        self._filler_prompts = filler_prompts
        self._rule = SentenceRule(config.method.search.delimiters)

    def pairs(self, prompts: Sequence[Prompt], trees: Sequence[Sequence[Node]]) -> list[Pair]:
        """Ask about the claims of some prompts' trees; return the questions that are worth training on."""
        from csr_vlm.training.pair_encoding import scored_pairs

        config, pairs = self._config, []
        self._scorer.set_negative_images([*prompts, *self._filler_prompts], config.scorer.others)
        asked = text_pairs(prompts, trees, self._scorer, config)
        scored = scored_pairs(asked, self._policy, self._iteration, self._rule)
        found = (pair for pair in scored if isinstance(pair, Pair))
        for name, about_one in groupby(found, key=lambda pair: pair.prompt.prompt_id.rpartition("?")[0]):
            key = f"{config.seed}:{self._iteration}:{name}"
            pairs += drop_if_sure(list(about_one), config.method.pairs.questions, key)
        self._scorer.forget()
        return pairs


def text_pairs(
    prompts: Sequence[Prompt], trees: Sequence[Sequence[Node]], scorer: ScorerGroup, config: RunConfig
) -> Iterator[TextPair]:
    settings = config.method.pairs.questions
    found = [find_claims(nodes, settings, config.scorer.used) for nodes in trees]
    pool: dict[str, list[str]] = {}
    for mine in found:
        for question, sentences in mine.sentences.items():
            said = pool.setdefault(question, [])
            said += [sentence for sentence in sentences if sentence not in said][: _WORDINGS - len(said)]
    for prompt, mine in zip(prompts, found, strict=True):
        chosen = negative_questions(mine, pool, settings.per_prompt, f"{config.seed}:{prompt.prompt_id}")
        strange = _judged(prompt, {question: pool[question] for question in chosen}, scorer, config.scorer.used)
        for number, (question, holds) in enumerate(choose_questions(mine, strange, settings)):
            answers = (settings.yes, settings.no) if holds else (settings.no, settings.yes)
            yield TextPair(Prompt(f"{prompt.prompt_id}?{number}", prompt.image, question), *answers)


def _judged(prompt: Prompt, asked: dict[str, list[str]], scorer: ScorerGroup, used: str) -> dict[str, float]:
    """Compute the best contrast of each claim's wordings on an image that it was not made about."""
    rows = iter(scorer.score([(prompt, sentence) for wordings in asked.values() for sentence in wordings]))
    place = f"prompt {prompt.prompt_id}: a question"
    return {question: max(contrast(next(rows), used, place) for _ in wordings) for question, wordings in asked.items()}
