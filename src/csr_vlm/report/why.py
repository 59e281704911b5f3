"""Explain a preference pair whose reward is that of its claims: the evidence for each, and what follows from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from csr_vlm.config.schema import RunConfig
from csr_vlm.core.formatting import fixed, signed
from csr_vlm.core.records import Node, Response
from csr_vlm.method.claim_evidence import Evidence, thing_of, words_of
from csr_vlm.method.claim_places import Level, level_of
from csr_vlm.method.claims import claim_finder
from csr_vlm.method.reward import SentenceReward, new_claims, path_ids, sentence_rewards, worth_of
from csr_vlm.report.annotate import AnnotatedSentence, mark_claims


@dataclass(frozen=True)
class WeighedClaim:
    """Hold a claim of one side of a pair."""

    words: str
    level: Level
    facts: str
    """Evidence, where it comes from, and what the claim is worth."""


@dataclass(frozen=True)
class Why:
    """Hold the reasons for a pair."""

    chosen: Sequence[WeighedClaim]
    rejected: Sequence[WeighedClaim]
    """Claims that only this side makes, after what both sides share."""
    summary: str


class ClaimReasons:
    """Explain the sentences and pairs of one prompt's tree.

    Args:
        nodes: All nodes of the tree.
        config: Configuration of the run, whose rewards are by claim.

    Raises:
        CsrError: A score is missing from the ledger.
    """

    def __init__(self, nodes: Sequence[Node], config: RunConfig) -> None:
        self._config = config
        self._evidence = Evidence.of(nodes, config.method.reward, config.scorer.used)
        self._nats = self._evidence.nats
        self._marked = {claim: min(nats, self._nats[thing_of(claim)]) for claim, nats in self._nats.items()}
        self._by_id = {node.node_id: node for node in nodes}
        self._num_sentences = sum(bool(node.sentence) for node in nodes)
        self._finder = claim_finder(config.method.claims.lexicon)
        self.rewards: Mapping[str, SentenceReward] = sentence_rewards(nodes, config.method, config.scorer.used)

    def sentence(self, node: Node, absent: Collection[str], in_both: bool) -> AnnotatedSentence:
        """Mark the claims of a sentence by their evidence."""
        markup = mark_claims(node.sentence, self._marked, self._finder, absent)
        reward = self.rewards.get(node.node_id)
        return AnnotatedSentence(markup, None, in_both, None if reward is None else reward.total)

    def pair(self, chosen: Response, rejected: Response) -> Why:
        """Explain why one response is preferred."""
        paths = [path_ids(side.node_id) for side in (chosen, rejected)]
        shared = sum(left == right for left, right in zip(*paths, strict=False))
        sides = [[self._by_id[node_id] for node_id in path[shared:]] for path in paths]
        claims = [[claim for node in nodes for claim in new_claims(node, self._by_id, self._nats)] for nodes in sides]
        own = [
            [claim for claim in side if claim not in other] for side, other in zip(claims, claims[::-1], strict=True)
        ]
        notes = [
            note
            for name, nodes, made in zip(("chosen", "rejected"), sides, claims, strict=True)
            if (note := self._note(name, nodes, made))
        ]
        margin = self._margin(sides, chosen.reward, rejected.reward)
        first, second = ([self._weighed(claim) for claim in side] for side in own)
        return Why(first, second, " ".join([*notes, margin]))

    def _margin(self, sides: Sequence[Sequence[Node]], chosen: float, rejected: float) -> str:
        """Say by how much one side is better; between sentences, their most doubtful claims decide."""
        method = self._config.method
        needed = f"where more than {fixed(method.pairs.min_margin * method.lambda_, 1)} is needed."
        if not method.compares_claims:
            compared, margin = f"R {fixed(chosen, 1)} against {fixed(rejected, 1)}", chosen - rejected
        else:
            good, bad = (self.rewards[s[-1].node_id].lowest if s and s[-1].sentence else 0.0 for s in sides)
            compared = f"The most doubtful claims decide: {signed(good, 1)} against {signed(bad, 1)} nats"
            margin = method.lambda_ * (good - bad)
        return f"{compared}, a margin of {fixed(margin, 1)}, {needed}"

    def _note(self, side: str, nodes: Sequence[Node], claims: Sequence[str]) -> str:
        """Say what a side is worth that makes no new claim."""
        if claims or not nodes:
            return ""
        if not any(node.sentence for node in nodes):
            return f"The {side} side ends here, which is worth 0."
        if any((reward := self.rewards.get(node.node_id)) is not None and reward.repeated for node in nodes):
            cost = fixed(self._config.method.reward.repeat_penalty, 1)
            return f"The {side} side says again what was said before, which costs {cost}."
        return f"The {side} side claims nothing new that can be checked, which is worth 0."

    def _weighed(self, claim: str) -> WeighedClaim:
        reward, nats = self._config.method.reward, self._nats[claim]
        scorer = self._evidence.weigh(self._evidence.scores[claim])
        mentions = self._evidence.mentions[thing_of(claim)]
        made = f"made by {mentions} of {self._num_sentences} sampled sentences"
        if earlier := self._evidence.earlier:
            made += f", and {earlier.get(thing_of(claim), 0):.0f} of the iterations before"
        worth = worth_of(nats, reward)
        facts = [
            f"{signed(nats, 1)} nats",
            f"scorer {signed(scorer, 1)}",
            f"{made} ({signed(nats - scorer, 1)})",
        ]
        rules = []
        if abs(nats) > reward.max_evidence:
            rules.append(f"evidence counts up to {reward.max_evidence:g}")
        if worth < 0 and reward.false_cost != 1:
            rules.append(f"evidence against a claim counts {reward.false_cost:g} times")
        if rules:
            facts.append(f"worth {signed(worth, 1)}, since {' and '.join(rules)}")
        return WeighedClaim(words_of(claim), level_of(nats), "; ".join(facts))
