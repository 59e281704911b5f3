"""Pairs of yes and no from an iteration's own ledger (``method.pairs.questions``)."""

from __future__ import annotations

from collections.abc import Iterator

from csr_vlm.data.pairs import TextPair
from csr_vlm.method.questions import questions
from csr_vlm.progress import Advance, Reporter
from csr_vlm.records import Pair, Prompt
from csr_vlm.store import tables
from csr_vlm.store.run import Run


def ask(run: Run, iteration: int, tell: Reporter) -> list[Pair]:
    """Ask about the claims of a ledger; the log-probabilities are those of the policy that made them."""
    from csr_vlm.generation.policy import load_policy
    from csr_vlm.generation.sentences import SentenceRule
    from csr_vlm.training.external import scored_pairs

    policy = load_policy(run.config.model, run.adapter_path(iteration - 1), run.config.data.max_image_pixels)
    rule = SentenceRule(run.config.method.search.delimiters)
    with tell.stage(f"iteration {iteration}: asking about claims", run.num_prompts) as advance:
        found = scored_pairs(_text_pairs(run, iteration, advance), policy, iteration, rule)
        return [pair for pair in found if isinstance(pair, Pair)]


def _text_pairs(run: Run, iteration: int, advance: Advance) -> Iterator[TextPair]:
    config = run.config.method.pairs.questions
    trees = (nodes for part in run.ledger_parts(iteration) for _, nodes in tables.read_trees(part))
    for prompt, nodes in zip(run.prompts(), trees, strict=True):
        for number, (question, holds) in enumerate(questions(nodes, config, run.config.scorer.used)):
            answers = (config.yes, config.no) if holds else (config.no, config.yes)
            yield TextPair(Prompt(f"{prompt.prompt_id}?{number}", prompt.image, question), *answers)
        advance(1)
