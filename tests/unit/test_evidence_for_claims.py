"""Test the evidence for claims, what sentences are worth by it, and the pairs that follow, by hand-worked numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest

from csr_vlm.config.schema import ClaimsConfig, MethodConfig, RewardConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import (
    EARLIER_COLUMN,
    Finish,
    Node,
    NodeStatus,
    Prompt,
    negatives_column,
    spread_column,
)
from csr_vlm.method import audit
from csr_vlm.method.claim_evidence import Evidence, claim_key, thing_of, words_of
from csr_vlm.method.pairs import make_pairs
from csr_vlm.method.reward import sentence_rewards
from csr_vlm.scoring.claim_scorer import ClaimScorer
from csr_vlm.scoring.scorer import ScorerGroup
from tests.unit.builders import config, node, prompt

CLAIM = RewardConfig(unit="claim", text_score="mean_logprob", text_scale=1.0, consistency=0.0)


def columns(z: float, **others: float) -> dict[str, float]:
    """Return the cosines of a claim that lies z spreads of 0.01 above the negative images."""
    return {"clip": 0.2 + 0.01 * z, negatives_column("clip"): 0.2, spread_column("clip"): 0.01, **others}


def said(node_id: str, text: str, claims: Mapping[str, float], **changes: object) -> Node:
    """Create a node that makes claims of the given z."""
    made = replace(node(node_id, text), claims={claim: columns(z) for claim, z in claims.items()})
    return replace(made, **changes) if changes else made  # type: ignore[arg-type]


def test_evidence_is_the_log_likelihood_ratio_under_the_effect_of_the_tree() -> None:
    nodes = [said("0", "A boat.", {"boat": 3.0}), said("1", "A fish.", {"fish": -0.3})]
    evidence = Evidence.of(nodes, CLAIM, "clip")
    # Two things said once each: mean z 1.35, shrunk by 2 / 3.
    delta = 1.35 * 2 / 3
    assert evidence.effects == {"clip": pytest.approx(delta)}
    assert evidence.nats["boat"] == pytest.approx(delta * 3.0 - delta**2 / 2)
    assert evidence.nats["fish"] == pytest.approx(-delta * 0.3 - delta**2 / 2)
    assert evidence.zero_line == pytest.approx(delta * 0.01 / 2)


def test_what_is_said_often_weighs_more_in_the_effect_and_has_the_consistency_term() -> None:
    nodes = [said(str(at), "A boat.", {"boat": 2.0}) for at in range(3)] + [said("3", "A fish.", {"fish": 0.0})]
    evidence = Evidence.of(nodes, CLAIM.model_copy(update={"consistency": 1.0}), "clip")
    effective = 4**2 / (3**2 + 1)
    delta = (3 * 2.0 / 4) * effective / (effective + 1)
    assert evidence.effects["clip"] == pytest.approx(delta)
    assert evidence.nats["boat"] == pytest.approx(delta * 2 - delta**2 / 2 + min(1, delta) * math.log(3 / 2))
    assert evidence.nats["fish"] == pytest.approx(-(delta**2) / 2 + min(1, delta) * math.log(1 / 2))


def test_after_the_first_iteration_what_earlier_policies_said_is_consistent() -> None:
    nodes = [said(str(at), "A boat.", {"boat": 2.0}) for at in range(3)] + [said("3", "A fish.", {"fish": 2.0})]
    made = {"boat": 1.0, "fish": 6.0}
    nodes = [replace(n, claims={c: {**row, EARLIER_COLUMN: made[c]} for c, row in n.claims.items()}) for n in nodes]
    evidence = Evidence.of(nodes, CLAIM.model_copy(update={"consistency": 1.0}), "clip")
    # 1.5 and 6.5 with mean 4; what this iteration's samples say three times and once does not count.
    assert evidence.log_frequencies == {
        "boat": pytest.approx(math.log(1.5 / 4)), "fish": pytest.approx(math.log(6.5 / 4)),
    }  # fmt: skip
    assert evidence.nats["fish"] - evidence.nats["boat"] == pytest.approx(math.log(6.5 / 1.5))


def test_a_scorer_that_sees_nothing_gives_no_evidence() -> None:
    nodes = [said("0", "A boat.", {"boat": 1.0}), said("1", "A fish.", {"fish": -2.0})]
    evidence = Evidence.of(nodes, CLAIM.model_copy(update={"consistency": 1.0}), "clip")
    assert set(evidence.nats.values()) == {0.0}
    assert evidence.zero_line is None
    empty = Evidence.of([node("0")], CLAIM, "clip")
    assert empty.nats == {}
    assert empty.weigh(columns(3.0)) == 0.0, "a tree without claims says nothing about those of others"


def test_several_scorers_count_by_their_mean() -> None:
    second = {"b": 0.5, negatives_column("b"): 0.1, spread_column("b"): 0.1}
    (one,) = [replace(said("0", "A boat.", {}), claims={"boat": columns(2.0, **second)})]
    evidence = Evidence.of([one], CLAIM, "clip+b")
    first, other = 2.0 / 2, 4.0 / 2
    assert evidence.effects == {"clip": pytest.approx(first), "b": pytest.approx(other)}
    assert evidence.nats["boat"] == pytest.approx((first * 2 - first**2 / 2 + other * 4 - other**2 / 2) / 2)


def test_claims_without_scores_are_an_error() -> None:
    unscored = replace(node("0", "A boat."), claims={"boat": {}})
    with pytest.raises(CsrError, match="the claims have no score by 'clip'"):
        _ = Evidence.of([unscored], CLAIM, "clip").nats


def test_a_sentence_is_worth_its_new_claims_and_a_false_one_costs_double() -> None:
    settings = config(method={"lambda": 1.0, "reward": {"consistency": 0.0, "repeat_penalty": 1.5}}).method
    nodes = [
        said("0", "A boat and a fish.", {"boat": 4.0, "fish": -1.0}),
        said("0.0", "The boat again.", {"boat": 4.0}),
        said("0.1", "It is calm.", {}),
        said("0.2", "The boat has a sail.", {"boat": 4.0, "sail": 4.0}),
        said("0.3", "A fish and a boat.", {"boat": 4.0, "fish": -1.0}),
        said("0.2.0", "The fish is near the sail.", {"fish": -1.0, "sail": 4.0}),
    ]
    nats = Evidence.of(nodes, settings.reward, "clip").nats
    rewards = sentence_rewards(nodes, settings, "clip")
    assert nats["fish"] < 0 < nats["boat"]
    assert rewards["0"].image == pytest.approx(min(nats["boat"], 8.0) + 2 * nats["fish"])
    assert (rewards["0.0"].total, rewards["0.0"].repeated) == (-1.5, True)
    assert (rewards["0.1"].total, rewards["0.1"].repeated) == (0.0, False)
    assert rewards["0.2"].image == pytest.approx(min(nats["sail"], 8.0)), "what was said before counts once"
    assert (rewards["0.3"].total, rewards["0.3"].repeated) == (-1.5, True)
    assert (rewards["0.2.0"].total, rewards["0.2.0"].repeated) == (0.0, False), "it relates things of two sentences"


def test_a_color_counts_with_the_lower_evidence() -> None:
    settings = config(method={"lambda": 1.0, "reward": {"consistency": 0.0, "false_cost": 1.0}}).method
    nodes = [said("0", "A red boat.", {"boat": 3.0, "boat/red": -1.0}), said("1", "A tree.", {"tree": 3.0})]
    nats = Evidence.of(nodes, settings.reward, "clip").nats
    assert sentence_rewards(nodes, settings, "clip")["0"].image == pytest.approx(nats["boat/red"])
    assert (claim_key("boat", "red"), thing_of("boat/red"), words_of("boat/red")) == ("boat/red", "boat", "red boat")


END = {"finish": Finish.EOS, "status": NodeStatus.FINISHED, "token_ids": (2,), "token_logprobs": (-0.1,)}


def tree(true: float = 4.0, false: float = -2.0) -> list[Node]:
    """Create a tree whose first sentences are true, false and without a claim; the true one may end after it."""
    return [
        said("0", "A boat.", {"boat": true}, status=NodeStatus.TOP),
        said("1", "A fish.", {"fish": false}, status=NodeStatus.BOTTOM),
        said("2", "It is calm.", {}),
        said("0.0", "", {}, **END),
        said("0.1", "A fish.", {"fish": false}),
        said("0.2", "A sail.", {"sail": true}),
        said("1.0", "A sail.", {"sail": true}),
        said("1.1", "A shark.", {"shark": false}),
    ]


def preferred(nodes: list[Node], **pairs: object) -> set[tuple[str, str]]:
    method = config(
        method={"lambda": 1.0, "reward": {"consistency": 0.0}, "pairs": {"min_margin": 1.0, **pairs}}
    ).method
    made = make_pairs(prompt("p"), nodes, method, "clip", 0)
    return set() if isinstance(made, str) else {(pair.chosen.node_id, pair.rejected.node_id) for pair in made}


def test_pairs_cross_the_zero_line_and_follow_a_clean_context() -> None:
    # Nothing follows the false one, and what claims nothing is not rejected.
    # Boat and sail have 2.8 nats, fish and shark -1.9.
    assert preferred(tree(), false_below=-1.0, true_above=2.0) == {("0", "1"), ("0.2", "0.0"), ("0.2", "0.1")}
    assert preferred(tree(), false_below=-1.0) == {("0", "1"), ("0.2", "0.1")}, "not true enough to go on"
    assert preferred(tree(), true_above=2.0) == {("0.2", "0.0")}, "no sentence is false enough to be rejected"


def test_ending_is_preferred_to_false_claims_alone() -> None:
    without_true = [n for n in tree() if n.node_id != "0.2"]
    assert ("0.0", "0.1") in preferred(without_true, min_margin=0.1, false_below=-0.1)
    weak = [n for n in tree(true=4.0) if n.node_id != "0.1"]
    assert ("0.0", "0.2") not in preferred(weak)


def test_a_sentence_beats_ending_only_if_its_most_doubtful_claim_is_judged_true() -> None:
    # With a delta of 2.3: boat and sail +6.6 nats each, mast +1.9. The sum of sail and mast is above any limit below.
    nodes = [
        said("0", "A boat.", {"boat": 4.0}, status=NodeStatus.TOP),
        said("0.0", "", {}, **END),
        said("0.1", "A sail and a mast.", {"sail": 4.0, "mast": 2.0}),
    ]
    settings = config(method={"lambda": 1.0, "reward": {"consistency": 0.0}}).method
    nats = Evidence.of(nodes, settings.reward, "clip").nats
    assert nats["sail"] > 6
    assert 1 < nats["mast"] < 2
    assert sentence_rewards(nodes, settings, "clip")["0.1"].lowest == pytest.approx(nats["mast"])
    assert preferred(nodes, true_above=1.0) == {("0.1", "0.0")}
    assert preferred(nodes, true_above=2.0) == set()
    assert preferred(nodes, true_above=1.0, min_margin=50.0) == {("0.1", "0.0")}, "the margin is for what is said"


def test_ending_beats_a_sentence_by_its_most_doubtful_claim() -> None:
    # The true sail outweighs the shark even at double cost, yet the sentence says something false.
    nodes = [
        said("0", "A boat.", {"boat": 4.0}, status=NodeStatus.TOP),
        said("0.0", "", {}, **END),
        said("0.1", "A sail and a shark.", {"sail": 4.0, "shark": -0.3}),
    ]
    settings = config(method={"lambda": 1.0, "reward": {"consistency": 0.0, "false_cost": 4.0}}).method
    nats = Evidence.of(nodes, settings.reward, "clip").nats
    reward = sentence_rewards(nodes, settings, "clip")["0.1"]
    assert reward.image < 0
    assert reward.lowest == pytest.approx(nats["shark"]), "the cost is not part of the evidence"
    made = make_pairs(prompt("p"), nodes, _with_margin(settings, -nats["shark"] - 0.1), "clip", 0)
    assert [(pair.chosen.node_id, pair.rejected.node_id) for pair in made] == [("0.0", "0.1")]  # type: ignore[union-attr]
    assert make_pairs(prompt("p"), nodes, _with_margin(settings, -nats["shark"] + 0.1), "clip", 0) == "margin"


def _with_margin(method: MethodConfig, margin: float) -> MethodConfig:
    return method.model_copy(update={"pairs": method.pairs.model_copy(update={"min_margin": margin})})


def test_a_sentence_that_repeats_an_earlier_one_is_never_preferred() -> None:
    boat, fish = said("0", "A boat.", {"boat": 4.0}), said("0.1", "A fish.", {"fish": -4.0})
    again, mood = said("0.0", "The boat again.", {"boat": 4.0}), said("0.2", "All is calm.", {})
    assert preferred([boat, again, fish]) == set()
    assert preferred([boat, again, fish, mood]) == {("0.2", "0.1")}


def test_ending_is_preferred_to_a_repeat_where_all_that_has_evidence_is_said() -> None:
    boat, again = said("0", "A boat.", {"boat": 4.0}), said("0.0", "The boat again.", {"boat": 4.0})
    end, fish = said("0.1", "", {}, **END), said("1", "A fish.", {"fish": -4.0})
    assert preferred([boat, again, end, fish], min_margin=50.0) == {("0.1", "0.0")}, "a repeat needs no margin"
    assert preferred([boat, again, fish], min_margin=50.0) == set(), "the policy would not end"
    sail = said("2", "A sail.", {"sail": 4.0})
    assert preferred([boat, again, end, fish, sail], min_margin=50.0) == set(), "the sail is not said"
    unseen = [said("0", "A boat.", {"boat": 0.0}), said("0.0", "The boat again.", {"boat": 0.0}), end]
    assert preferred(unseen) == set(), "a scorer that sees nothing does not know what is left to say"
    said_as_well = replace(said("0.2", "A sail.", {"sail": 4.0}), text=" A sail.")
    assert preferred([boat, again, end, said_as_well], min_margin=1.0) == {("0.2", "0.1"), ("0.2", "0.0")}


def test_a_sentence_with_a_claim_against_the_evidence_is_never_preferred() -> None:
    # "A boat, a sail and a shark" is worth most, but the shark is not there: the plain boat is preferred to the fish.
    nodes = [
        said("0", "A boat, a sail and a shark.", {"boat": 4.0, "sail": 4.0, "shark": 0.2}),
        said("1", "A boat.", {"boat": 4.0}),
        said("2", "A fish.", {"fish": -1.0}),
    ]
    settings = config(method={"lambda": 1.0, "reward": {"consistency": 0.0}}).method
    rewards = sentence_rewards(nodes, settings, "clip")
    assert rewards["0"].total > rewards["1"].total
    assert rewards["0"].lowest < 0 < rewards["1"].lowest
    assert preferred(nodes) == {("1", "2")}


def test_reasons_tell_no_evidence_from_a_small_margin() -> None:
    method = config(method={"pairs": {"min_margin": 50.0, "true_above": 50.0}}).method
    assert make_pairs(prompt("p"), tree(), method, "clip", 0) == "margin"
    assert make_pairs(prompt("p"), tree(true=-1.0), method, "clip", 0) == "no_evidence"


def test_pairs_know_the_tokens_that_both_sides_share() -> None:
    first = replace(
        said("0", "A boat.", {"boat": 4.0}, status=NodeStatus.TOP), token_ids=(5, 6), token_logprobs=(-1, -2)
    )
    good = said("0.0", "A sail.", {"sail": 4.0}, token_ids=(7, 8, 9), token_logprobs=(-3, -4, -5))
    bad = said("0.1", "A fish.", {"fish": -2.0}, token_ids=(7, 9), token_logprobs=(-3, -6))
    method = config(method={"pairs": {"min_margin": 1.0}}).method
    (pair,) = make_pairs(prompt("p"), [first, good, bad], method, "clip", 0)
    assert (pair.shared_tokens, pair.shared_logprob) == (3, -6.0)


class Cosines:
    """Score captions by a table; images with the same first letter are similar."""

    def __init__(self, table: Mapping[tuple[str, str], float], default: float = 0.1) -> None:
        self.name, self._table, self._default = "clip", table, default
        self.calls: list[tuple[str, str]] = []

    def score(self, items):  # type: ignore[no-untyped-def]
        self.calls += [(p.image, text) for p, text in items]
        return [{"clip": self._table.get((p.image, text), self._default)} for p, text in items]

    def similarities(self, prompt: Prompt, others: list[Prompt]) -> list[float]:
        return [float(other.image[0] == prompt.image[0]) for other in others]

    def forget(self) -> None:
        pass


def test_claims_are_scored_once_an_image_with_spread_and_nearest_images() -> None:
    prompts = [Prompt(name, name, "") for name in ("a1", "b1", "a2", "b2", "b3")]
    text = "a photo of a boat"
    scorer = Cosines({("a1", text): 0.5, ("b1", text): 0.2, ("a2", text): 0.4, ("b2", text): 0.3})
    group = ScorerGroup([scorer])
    group.set_negative_images(prompts, 4)
    claims = ClaimScorer(group, ClaimsConfig())
    (found, again, none) = claims([(prompts[0], "There is a boat."), (prompts[0], "Two boats."), (prompts[0], "Calm.")])
    # Negatives 0.2, 0.4, 0.3, 0.1 with median 0.25: below it 0.2 and 0.1. The nearest two: a2, then b1 by order.
    assert found["boat"] == {
        "clip": 0.5,
        "clip:others": pytest.approx(0.25),
        "clip:spread": pytest.approx(math.sqrt((0.05**2 + 0.15**2) / 2)),
        "clip:nearest": pytest.approx((0.4 + 0.2) / 2),
    }
    assert again == found
    assert none == {}
    assert scorer.calls.count(("a1", text)) == 1


def test_claims_get_the_number_of_sentences_of_the_iterations_before() -> None:
    group = ScorerGroup([Cosines({})])
    claims = ClaimScorer(group, ClaimsConfig(), {("a", "boat"): 7})
    (found,) = claims([(Prompt("a", "a", ""), "A red boat near a tree.")])
    assert {claim: row[EARLIER_COLUMN] for claim, row in found.items()} == {"boat": 7, "boat/red": 7, "tree": 0}


def test_a_red_boat_is_two_claims() -> None:
    claims = ClaimScorer(ScorerGroup([Cosines({})]), ClaimsConfig())
    assert claims.claims_in("There is a red boat near a tree.") == ["boat", "boat/red", "tree"]


def test_signs_of_claims_are_computed_from_cues_that_did_not_choose_the_pairs() -> None:
    def cues(own: float, others: float, nearest: float, second: float) -> dict[str, float]:
        return {
            "clip": own, "clip:others": others, "clip:spread": 0.01, "clip:nearest": nearest,
            "b": second, "b:others": 0.0, "b:spread": 0.01,
        }  # fmt: skip

    boat, fish = cues(0.30, 0.2, 0.25, 0.05), cues(0.19, 0.2, 0.25, -0.05)
    nodes = [
        replace(said("0", "A boat.", {}), claims={"boat": boat}),
        replace(said("1", "Boats.", {}), claims={"boat": boat}),
        replace(said("2", "A fish.", {}), claims={"fish": fish}),
    ]
    method = config(method={"pairs": {"min_margin": 1.0}}).method
    pairs = make_pairs(prompt("p"), nodes, method, "clip", 0)
    metrics = audit.pair_metrics([audit.tree_metrics(nodes, pairs, method, "clip")])
    assert metrics["claim_agreement"] == pytest.approx(2 / 3), "the boat twice, the fish not"
    assert metrics["nearest_agreement"] == 1.0, "only what is said at least as often as the average"
    assert metrics["cue_agreement"] == 1.0
    assert metrics["second_win"] == 1.0
    assert "relevance_win" not in metrics
    assert not [check for check in audit.pair_checks(metrics, {}) if check.value is None]


def test_whole_responses_are_compared_by_their_rewards() -> None:
    nodes = [
        said("0", "A boat.", {"boat": 4.0}, finish=Finish.EOS, status=NodeStatus.FINISHED),
        said("1", "A fish.", {"fish": -2.0}, finish=Finish.EOS, status=NodeStatus.FINISHED),
    ]
    assert preferred(nodes, between="responses", per_prompt=1) == {("0", "1")}
