"""Make yes/no question pairs from an iteration's ledger (``method.pairs.questions``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import TYPE_CHECKING

from csr_vlm.config.schema import QuestionsConfig, RunConfig
from csr_vlm.core.records import Node, Pair, Prompt
from csr_vlm.data.external_pairs import TextPair
from csr_vlm.evaluation.statistics import auc
from csr_vlm.method.claim_evidence import Evidence, thing_of
from csr_vlm.method.questions import choose_questions, choose_unclaimed, is_answered, select_informative
from csr_vlm.method.sentences import SentenceRule
from csr_vlm.scoring.scorer import with_gray_image

if TYPE_CHECKING:
    from csr_vlm.models.policy import Policy
    from csr_vlm.scoring.claim_scorer import ClaimScorer
    from csr_vlm.scoring.scorer import ScorerGroup

_FEWEST_QUESTIONS = 20
_MOST_QUESTIONS = 20_000


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
        """Ask about the claims in the trees of some prompts; return the pairs of questions that the policy answers."""
        from csr_vlm.scoring.claim_scorer import ClaimScorer
        from csr_vlm.training.pair_encoding import encode_pairs

        config = self._config
        settings = self._with_answered_wordings(prompts, trees)
        if settings is None:
            return []
        negatives = with_gray_image([*prompts, *self._filler_prompts])
        self._scorer.set_negative_images(negatives, config.scorer.others)
        claim_scorer = ClaimScorer(self._scorer, config.method.claims)
        texts = text_pairs(prompts, trees, claim_scorer, config, settings)
        scored = encode_pairs(texts, self._policy, self._iteration, self._rule)
        pairs = [pair for pair in scored if isinstance(pair, Pair) and is_answered(pair, settings)]
        self._scorer.forget()
        return pairs

    def _with_answered_wordings(
        self, prompts: Sequence[Prompt], trees: Sequence[Sequence[Node]]
    ) -> QuestionsConfig | None:
        """Return the settings with the wordings that the policy answers by yes or no; None if it answers none of them.

        They are tried on the first claim of the group.
        """
        from csr_vlm.training.pair_encoding import encode_pairs

        settings = self._config.method.pairs.questions
        claims = (
            (prompt, claim) for prompt, nodes in zip(prompts, trees, strict=True) for n in nodes for claim in n.claims
        )
        first = next(claims, None)
        if first is None:
            return None
        prompt, claim = first
        texts = [
            TextPair(
                Prompt(prompt.prompt_id, prompt.image, settings.ask(thing_of(claim), n)), settings.yes, settings.no
            )
            for n in range(len(settings.wordings))
        ]
        tried = encode_pairs(texts, self._policy, self._iteration, self._rule)
        answered = tuple(
            wording
            for wording, pair in zip(settings.wordings, tried, strict=True)
            if isinstance(pair, Pair) and is_answered(pair, settings)
        )
        return settings.model_copy(update={"wordings": answered}) if answered else None


def worth_training(
    answered: Callable[[], Iterable[Pair]], config: RunConfig, iteration: int, log: Callable[[str], None]
) -> Iterator[Pair]:
    """Yield the question pairs worth training on; none if the policy does not look at the image to answer.

    Args:
        answered: Returns all pairs of questions that the policy answers, prompt by prompt.
        config: Settings of the questions, and the seed.
        iteration: Iteration of the pairs.
        log: Called with a message if no question is worth training on.
    """
    settings = config.method.pairs.questions
    found = answer_auc(answered(), settings.yes)
    if found is not None and found < settings.min_auc:
        log(
            f"iteration {iteration}: no question is trained, because the policy's answers hardly depend on the image "
            f"(AUC {found:.2f}, method.pairs.questions.min_auc {settings.min_auc:g})"
        )
        return
    for prompt_id, of_prompt in groupby(answered(), key=lambda pair: pair.prompt.prompt_id.rpartition("?")[0]):
        yield from select_informative(list(of_prompt), settings, f"{config.seed}:{iteration}:{prompt_id}")


def answer_auc(pairs: Iterable[Pair], yes: str) -> float | None:
    """Compute how well log P(yes) - log P(no) separates questions with the answer yes from those with no.

    Only the first 20,000 questions count. Returns None for fewer than 20 questions of either kind.
    """
    margins: dict[bool, list[float]] = {True: [], False: []}
    for pair in islice(pairs, _MOST_QUESTIONS):
        is_yes = pair.chosen.text == yes
        margin = pair.chosen.logprob - pair.rejected.logprob
        margins[is_yes].append(margin if is_yes else -margin)
    if min(len(of_kind) for of_kind in margins.values()) < _FEWEST_QUESTIONS:
        return None
    return auc(margins[True], margins[False])


def text_pairs(
    prompts: Sequence[Prompt],
    trees: Sequence[Sequence[Node]],
    claim_scorer: ClaimScorer,
    config: RunConfig,
    settings: QuestionsConfig,
) -> Iterator[TextPair]:
    """Yield the questions about each prompt's claims with the right and the wrong answer.

    Args:
        prompts: A group of prompts.
        trees: Their trees, with scored claims.
        claim_scorer: Scores the claims of other trees on a prompt's image.
        config: Settings of the rewards, and the seed.
        settings: Settings of the questions.
    """
    evidence = [Evidence.of(nodes, config.method.reward, config.scorer.used) for nodes in trees]
    pool = sorted({thing for of_tree in evidence for thing in of_tree.mentions})
    for prompt, of_tree in zip(prompts, evidence, strict=True):
        key = f"{config.seed}:{prompt.prompt_id}"
        claimed = {claim: nats for claim, nats in of_tree.nats.items() if claim == thing_of(claim)}
        others = choose_unclaimed(claimed, pool, settings.per_prompt, key)
        scores = claim_scorer.score([(prompt, thing) for thing in others])
        unclaimed = {thing: of_tree.weigh(columns) for thing, columns in zip(others, scores, strict=True)}
        for number, (question, holds) in enumerate(choose_questions(claimed, unclaimed, settings, key)):
            answers = (settings.yes, settings.no) if holds else (settings.no, settings.yes)
            yield TextPair(Prompt(f"{prompt.prompt_id}?{number}", prompt.image, question), *answers)
