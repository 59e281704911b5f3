"""Make yes/no question pairs from an iteration's ledger (``method.pairs.questions``)."""

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
from csr_vlm.scoring.scorer import with_gray_image

if TYPE_CHECKING:
    from csr_vlm.models.policy import Policy
    from csr_vlm.scoring.scorer import ScorerGroup

_NUM_WORDINGS = 8
"""Sentences kept per claim, to score the claim on images about which it was not made."""


class ClaimQuestioner:
    """Ask a policy about the claims in its trees, one group of prompts at a time.

    Args:
        config: Settings of the questions; they may differ from the run's.
        policy: Policy that generated the ledger; the pairs carry its log-probabilities.
        scorer: Scorer of claims on images.
        iteration: Iteration of the ledger.
        filler_prompts: Prompts whose images serve as negatives if a group is too small to supply them.
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
        """Ask about the claims in the trees of some prompts; return the question pairs worth training on."""
        from csr_vlm.training.pair_encoding import encode_pairs

        config, selected = self._config, []
        negatives = with_gray_image([*prompts, *self._filler_prompts])
        self._scorer.set_negative_images(negatives, config.scorer.others)
        texts = text_pairs(prompts, trees, self._scorer, config)
        scored = encode_pairs(texts, self._policy, self._iteration, self._rule)
        pairs = (pair for pair in scored if isinstance(pair, Pair))
        for prompt_id, of_prompt in groupby(pairs, key=lambda pair: pair.prompt.prompt_id.rpartition("?")[0]):
            key = f"{config.seed}:{self._iteration}:{prompt_id}"
            selected += drop_if_sure(list(of_prompt), config.method.pairs.questions, key)
        self._scorer.forget()
        return selected


def text_pairs(
    prompts: Sequence[Prompt], trees: Sequence[Sequence[Node]], scorer: ScorerGroup, config: RunConfig
) -> Iterator[TextPair]:
    settings = config.method.pairs.questions
    lexicon = config.method.claims.lexicon
    claims_by_prompt = [find_claims(nodes, settings, config.scorer.used, lexicon) for nodes in trees]
    pool: dict[str, list[str]] = {}
    for prompt_claims in claims_by_prompt:
        for question, sentences in prompt_claims.sentences.items():
            wordings = pool.setdefault(question, [])
            new = [sentence for sentence in sentences if sentence not in wordings]
            wordings += new[: _NUM_WORDINGS - len(wordings)]
    for prompt, prompt_claims in zip(prompts, claims_by_prompt, strict=True):
        chosen = negative_questions(prompt_claims, pool, settings.per_prompt, f"{config.seed}:{prompt.prompt_id}")
        foreign = _best_contrasts(prompt, {question: pool[question] for question in chosen}, scorer, config.scorer.used)
        for number, (question, holds) in enumerate(choose_questions(prompt_claims, foreign, settings)):
            answers = (settings.yes, settings.no) if holds else (settings.no, settings.yes)
            yield TextPair(Prompt(f"{prompt.prompt_id}?{number}", prompt.image, question), *answers)


def _best_contrasts(
    prompt: Prompt, wordings_by_question: dict[str, list[str]], scorer: ScorerGroup, used: str
) -> dict[str, float]:
    """Compute the best contrast of each claim's wordings on an image about which it was not made."""
    items = [(prompt, sentence) for wordings in wordings_by_question.values() for sentence in wordings]
    rows = iter(scorer.score(items))
    where = f"prompt {prompt.prompt_id}: a question"
    return {
        question: max(contrast(next(rows), used, where) for _ in wordings)
        for question, wordings in wordings_by_question.items()
    }
