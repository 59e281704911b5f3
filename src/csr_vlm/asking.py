"""Pairs of yes and no from an iteration's own ledger (``method.pairs.questions``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import TYPE_CHECKING

from csr_vlm.config import RunConfig
from csr_vlm.data.pairs import TextPair
from csr_vlm.generation.sentences import SentenceRule
from csr_vlm.method.questions import claims, questions, strangers, worth_asking
from csr_vlm.method.reward import contrast
from csr_vlm.progress import Reporter
from csr_vlm.records import Node, Pair, Prompt
from csr_vlm.store import ledger, tables
from csr_vlm.store.run import Run

if TYPE_CHECKING:
    from csr_vlm.generation.policy import Policy
    from csr_vlm.scoring.scorer import ScorerGroup

_WORDINGS = 8
"""Sentences that speak for a claim where it was not made."""


def ask(run: Run, iteration: int, config: RunConfig, policy: Policy, scorer: ScorerGroup, tell: Reporter) -> list[Pair]:
    """Ask about the claims of a ledger, work item by work item.

    Args:
        config: What is asked; it may differ from the run's.
        policy: The one that made the ledger; the log-probabilities are its own.
    """
    from csr_vlm.training.external import scored_pairs

    rule = SentenceRule(config.method.search.delimiters)
    pairs: list[Pair] = []
    company = next(tables.prompt_groups(run.prompts_path))
    trees = ledger.trees(run, iteration)
    with tell.stage(f"iteration {iteration}: asking about claims", run.num_prompts) as advance:
        for prompts in tables.prompt_groups(run.prompts_path):
            scorer.compare_among([*prompts, *company], config.scorer.others)
            asked = _text_pairs(prompts, list(islice(trees, len(prompts))), scorer, config)
            found = (pair for pair in scored_pairs(asked, policy, iteration, rule) if isinstance(pair, Pair))
            for name, about_one in groupby(found, key=lambda pair: pair.prompt.prompt_id.rpartition("?")[0]):
                key = f"{config.seed}:{iteration}:{name}"
                pairs += worth_asking(list(about_one), config.method.pairs.questions, key)
            scorer.forget()
            advance(len(prompts))
    return pairs


def _text_pairs(
    prompts: Sequence[Prompt], trees: Sequence[Sequence[Node]], scorer: ScorerGroup, config: RunConfig
) -> Iterator[TextPair]:
    settings = config.method.pairs.questions
    found = [claims(nodes, settings, config.scorer.used) for nodes in trees]
    pool: dict[str, list[str]] = {}
    for mine in found:
        for question, sentences in mine.sentences.items():
            said = pool.setdefault(question, [])
            said += [sentence for sentence in sentences if sentence not in said][: _WORDINGS - len(said)]
    for prompt, mine in zip(prompts, found, strict=True):
        chosen = strangers(mine, pool, settings.per_prompt, f"{config.seed}:{prompt.prompt_id}")
        strange = _judged(prompt, {question: pool[question] for question in chosen}, scorer, config.scorer.used)
        for number, (question, holds) in enumerate(questions(mine, strange, settings)):
            answers = (settings.yes, settings.no) if holds else (settings.no, settings.yes)
            yield TextPair(Prompt(f"{prompt.prompt_id}?{number}", prompt.image, question), *answers)


def _judged(prompt: Prompt, asked: dict[str, list[str]], scorer: ScorerGroup, used: str) -> dict[str, float]:
    """Compute the best contrast of each claim's wordings on an image that it was not made about."""
    rows = iter(scorer.score([(prompt, sentence) for wordings in asked.values() for sentence in wordings]))
    place = f"prompt {prompt.prompt_id}: a question"
    return {question: max(contrast(next(rows), used, place) for _ in wordings) for question, wordings in asked.items()}
