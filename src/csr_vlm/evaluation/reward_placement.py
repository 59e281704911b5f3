"""Place a preset's zero line and margin among the contrasts of labeled sentences.

The sentences of a picture's captions are given to the method's own functions as if they were
candidates of one tree that the policy finds equally likely, so that only R_I decides:

- The zero line is the contrast at which R(s) = 0, or with ``unit: claim`` the contrast of a claim at
  which there is no evidence either way, delta sigma / 2. Ending a response is worth 0, so ending is
  preferred to a sentence whose reward is below 0 by more than the margin.
- The margin is ``method.pairs.min_margin`` times the range of the rewards of the tree; with ``unit:
  claim`` it is in nats and has no place among contrasts.

A true and a false detail of one picture are decided right if the true one has the higher reward by
more than the margin, wrong if the false one has, and not at all otherwise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from csr_vlm.config.schema import MethodConfig
from csr_vlm.core.records import Finish, Node, NodeStatus
from csr_vlm.evaluation.labeled_captions import LabeledText
from csr_vlm.evaluation.scorer_validation import ScoredCaptions
from csr_vlm.evaluation.sentence_kinds import DETAILS
from csr_vlm.method.claim_evidence import Evidence
from csr_vlm.method.questions import clear_answer
from csr_vlm.method.reward import reward_scale, sentence_rewards

MARGINS = {"sentence": (0.0, 0.1, 0.25, 0.4, 0.6, 0.8), "claim": (0.0, 2.0, 4.0, 7.0, 10.0, 15.0)}
"""Values of ``min_margin`` that are tried, by ``method.reward.unit``."""


@dataclass(frozen=True)
class MarginOutcome:
    """Count what a margin decides about the details of each picture."""

    min_margin: float
    right: int
    """Pairs of a true and a false detail of which the true one is preferred."""
    wrong: int
    undecided: int
    end_over_true: int
    """True details to which ending the response is preferred."""
    end_over_false: int


@dataclass(frozen=True)
class Placement:
    """Hold where the zero line and the margin of a method lie among a scorer's contrasts."""

    scorer: str
    zero_line: float | None
    """Median over pictures of the contrast at which R(s) = 0; None if R_I has no weight or rewards are ranks."""
    margin: float | None
    """Median over pictures of the margin, as a difference of contrasts; None with ``unit: claim``."""
    true_below_zero: float | None
    """Share of the true details with a reward below 0."""
    false_above_zero: float | None
    """Share of the false details with a reward above 0."""
    num_true: int
    num_false: int
    margins: tuple[MarginOutcome, ...]
    """The first one is that of the method's own margin."""
    questions: Mapping[str, int]
    """Claims by what the method would ask: yes_right, yes_wrong, no_right, no_wrong, not_asked."""

    def dump(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Tree:
    """Hold the details of one picture with their rewards."""

    rewards: tuple[float, ...]
    is_true: tuple[bool, ...]
    scale: float
    zero_line: float | None


def place(scored: ScoredCaptions, scorer: str, method: MethodConfig) -> Placement:
    """Run the method's rewards on the sentences of each picture and compare them with the truth."""
    unit = 100.0 * method.lambda_
    trees = list(_trees(scored, scorer, method))
    zero = [tree.zero_line for tree in trees if tree.zero_line is not None]
    true = [r for tree in trees for r, ok in zip(tree.rewards, tree.is_true, strict=True) if ok]
    false = [r for tree in trees for r, ok in zip(tree.rewards, tree.is_true, strict=True) if not ok]
    own, by_claim = method.pairs.min_margin, method.reward.unit == "claim"
    return Placement(
        scorer=scorer,
        zero_line=float(np.median(zero)) if zero else None,
        margin=float(np.median([own * tree.scale for tree in trees])) / unit if zero and not by_claim else None,
        true_below_zero=float(np.mean([r < 0 for r in true])) if true else None,
        false_above_zero=float(np.mean([r > 0 for r in false])) if false else None,
        num_true=len(true),
        num_false=len(false),
        margins=tuple(_outcome(trees, margin) for margin in (own, *MARGINS[method.reward.unit])),
        questions=_questions(scored, scorer, method),
    )


def _trees(scored: ScoredCaptions, scorer: str, method: MethodConfig) -> list[_Tree]:
    by_picture: dict[int, list[int]] = defaultdict(list)
    texts, contrasts = scored.texts("sentences"), scored.contrasts(scorer, "sentences")
    for index, text in enumerate(texts):
        by_picture[text.picture].append(index)
    trees = []
    claims = _claims_by_picture(scored)
    for picture, indices in by_picture.items():
        nodes = [
            _node(number, texts[index], scored.sentences[index], claims[picture])
            for number, index in enumerate(indices)
        ]
        rewards = sentence_rewards(nodes, method, scorer)
        totals = [rewards[node.node_id].total for node in nodes]
        details = [n for n, i in enumerate(indices) if texts[i].kind in DETAILS and texts[i].truth is not None]
        line = None
        if method.reward.unit == "claim":
            line = Evidence.of(nodes, method.reward, scorer).zero_line
        elif method.lambda_ > 0 and (method.reward.fusion, method.reward.image_score) == ("weighted", "contrast"):
            # R(s) is linear in the contrast with slope 100 lambda, so any sentence gives the line.
            line = contrasts[indices[0]] - totals[0] / (100.0 * method.lambda_)
        trees.append(
            _Tree(
                tuple(totals[number] for number in details),
                tuple(texts[indices[number]].truth == "grounded" for number in details),
                reward_scale(rewards.values(), method),
                line,
            )
        )
    return trees


def _claims_by_picture(scored: ScoredCaptions) -> Mapping[int, Mapping[str, Mapping[str, float]]]:
    """Return the cosines of the claims about each picture, by the name of the thing."""
    by_picture: dict[int, dict[str, Mapping[str, float]]] = defaultdict(dict)
    for claim, row in zip(scored.texts("claims"), scored.claims, strict=True):
        by_picture[claim.picture][claim.claims[0]] = row
    return by_picture


def _node(
    number: int, text: LabeledText, cosines: Mapping[str, float], claims: Mapping[str, Mapping[str, float]]
) -> Node:
    """Represent a sentence as a candidate first sentence whose every token has probability 1."""
    return Node(
        prompt_id=str(text.picture), iteration=1, node_id=str(number), parent_id="", depth=1, token_ids=(0,),
        token_logprobs=(0.0,), text=text.text, finish=Finish.DELIMITER, status=NodeStatus.PRUNED, cosines=cosines,
        claims={name: claims[name] for name in text.claims if name in claims},
    )  # fmt: skip


def _outcome(trees: Sequence[_Tree], min_margin: float) -> MarginOutcome:
    right = wrong = undecided = end_over_true = end_over_false = 0
    for tree in trees:
        margin = min_margin * tree.scale
        true = [r for r, ok in zip(tree.rewards, tree.is_true, strict=True) if ok]
        false = [r for r, ok in zip(tree.rewards, tree.is_true, strict=True) if not ok]
        gaps = [a - b for a in true for b in false]
        right += sum(gap > margin for gap in gaps)
        wrong += sum(-gap > margin for gap in gaps)
        undecided += sum(abs(gap) <= margin for gap in gaps)
        end_over_true += sum(-r > margin for r in true)
        end_over_false += sum(-r > margin for r in false)
    return MarginOutcome(min_margin, right, wrong, undecided, end_over_true, end_over_false)


def _questions(scored: ScoredCaptions, scorer: str, method: MethodConfig) -> dict[str, int]:
    """Count the answers that the method would give to questions about the claims of each picture."""
    counts = dict.fromkeys(("yes_right", "yes_wrong", "no_right", "no_wrong", "not_asked"), 0)
    texts, claims = scored.texts("sentences"), _claims_by_picture(scored)
    nodes: dict[int, list[Node]] = defaultdict(list)
    for number, (text, row) in enumerate(zip(texts, scored.sentences, strict=True)):
        nodes[text.picture].append(_node(number, text, row, claims[text.picture]))
    nats = {picture: Evidence.of(of_picture, method.reward, scorer).nats for picture, of_picture in nodes.items()}
    questions = method.pairs.questions
    for claim in scored.texts("claims"):
        name = claim.claims[0]
        answer = None if name not in nats[claim.picture] else clear_answer(nats[claim.picture][name], questions)
        if answer is None:
            counts["not_asked"] += 1
        else:
            is_right = answer == (claim.truth == "grounded")
            counts[f"{'yes' if answer else 'no'}_{'right' if is_right else 'wrong'}"] += 1
    return counts
