"""Test the quality metrics on hand-worked trees, their bounds, and pairs that must fail them."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Finish, Node, NodeStatus, negatives_column
from csr_vlm.method import audit
from csr_vlm.method.audit import PAIR_BOUNDS, RESPONSE_BOUNDS, Bound, Check, TreeMetrics, Verdict
from csr_vlm.method.pairs import make_pairs
from tests.unit.builders import method, node, prompt

BOUNDS = PAIR_BOUNDS | RESPONSE_BOUNDS

# Lambda 1, so R(s) is 100 times the cosine: boat 40, car 10, fish 50. Their middle is 30, so
# boat and fish are there to be seen; from worst to best it is 40. R(y) is the mean.
TREE = [
    node("0", "A boat.", cosine=0.40, ids=(1,), status=NodeStatus.TOP),
    node("1", "A car.", cosine=0.10, ids=(2,), status=NodeStatus.TOP),
    node("0.0", "", cosine=None, ids=(0,), status=NodeStatus.FINISHED, finish=Finish.EOS),  # 40
    node("0.1", " A fish.", cosine=0.50, ids=(3, 0), status=NodeStatus.FINISHED, finish=Finish.EOS),  # 45
    node("1.0", " A boat.", cosine=0.40, ids=(1, 0), status=NodeStatus.FINISHED, finish=Finish.EOS),  # 25
    node("1.1", " A car.", cosine=0.10, ids=(2, 0), status=NodeStatus.FINISHED, finish=Finish.EOS),  # 10, a repeat
]


def tree_metrics_of(nodes: list[Node], weight: float = 1.0, seed: int = 0, **sections: object) -> TreeMetrics:
    how = method(weight, **sections)
    pairs = make_pairs(prompt(nodes[0].prompt_id), nodes, how, "clip", seed)
    return audit.tree_metrics(nodes, [] if isinstance(pairs, str) else pairs, how, "clip")


def verdict_of(trees: list[TreeMetrics], metric: str) -> Verdict:
    actual = {check.metric: check for check in audit.checks(audit.pair_metrics(trees), PAIR_BOUNDS)}
    return actual[metric].verdict


def test_one_pair_of_whole_responses():
    # Boat and fish over car and car.
    actual = tree_metrics_of(TREE)
    assert actual.pairs == 1
    assert (actual.wins, actual.losses) == (1, 0), "boat and fish, 2, against a car, -1, said again, 0"
    assert actual.margin == pytest.approx(35 / 40)
    assert actual.length_gap == 0
    assert actual.omission_gap == -2, "the rejected has neither boat nor fish, the chosen both"
    assert actual.repeat_gap == -1, "the rejected says the car twice"


def test_several_pairs_of_whole_responses_add_up():
    # Boat and fish over car and car, over car and boat, over the boat alone.
    actual = tree_metrics_of(TREE, pairs={"per_prompt": 3})
    assert actual.pairs == 3
    assert (actual.wins, actual.losses) == (3, 0), "2 to -1; 2 to car and boat, 0; 2 to the boat, 1"
    assert actual.margin == pytest.approx((35 + 20 + 5) / 40)
    assert actual.length_gap == 0 + 0 + 1
    assert actual.omission_gap == -2 - 1 - 1
    assert actual.repeat_gap == -1 + 0 + 0


def test_pairs_of_siblings():
    # Fish over ending, boat over car at the start, and boat over the car again.
    actual = tree_metrics_of(TREE, pairs={"between": "siblings", "per_prompt": 9})
    assert actual.pairs == 3
    assert (actual.wins, actual.losses) == (3, 0), "2 to 1; 1 to -1; car and boat, 0, to car and car, -1"
    # Boat and fish after it, 90, to car and boat after it, 50.
    assert actual.margin == pytest.approx((50 + 40 + 30) / 40)
    assert actual.length_gap == 1 + 0 + 0
    assert actual.omission_gap == -1 - 1 - 1
    assert actual.repeat_gap == 0 + 0 - 1


def test_equal_relevance_is_neither_a_win_nor_a_loss():
    # Rewards differ by R_T alone; both sentences have the same R_I.
    nodes = [
        node("0", "A boat.", cosine=0.3, logprobs=(-0.1,), ids=(1,), status=NodeStatus.FINISHED, finish=Finish.EOS),
        node("1", "A fish.", cosine=0.3, logprobs=(-2.0,), ids=(2,), status=NodeStatus.FINISHED, finish=Finish.EOS),
    ]
    for between in ("responses", "siblings"):
        actual = tree_metrics_of(nodes, 0.5, pairs={"between": between})
        assert (actual.pairs, actual.wins, actual.losses) == (1, 0, 0)
        assert "relevance_win" not in audit.pair_metrics([actual])


def test_length_correlation_is_pearsons_r_over_complete_responses():
    # Lengths 1, 2, 2, 2 against rewards 40, 45, 25, 10: covariance -10, variances 3/4 and 750.
    assert tree_metrics_of(TREE).correlation == pytest.approx(-10 / math.sqrt(0.75 * 750))
    cut = [*TREE, node("1.2", " A tree", cosine=0.9, ids=(4,), status=NodeStatus.TRUNCATED, finish=Finish.LENGTH)]
    assert tree_metrics_of(cut).correlation == pytest.approx(-10 / math.sqrt(0.75 * 750)), (
        "what is cut off does not count"
    )


def test_length_correlation_is_undefined_between_siblings():
    assert tree_metrics_of(TREE, pairs={"between": "siblings"}).correlation is None


def test_duplicates_and_filtered_nodes_are_ignored():
    bright = [
        replace(node("2", "A sun.", cosine=0.99), status=status)
        for status in (NodeStatus.DUPLICATE, NodeStatus.FILTERED)
    ]
    assert tree_metrics_of([*TREE, *bright]) == tree_metrics_of(TREE)


def test_length_correlation_requires_variation():
    assert tree_metrics_of(TREE[:4]).correlation is None, "two responses always lie on a line"
    flat = [node(str(i), f"Thing {i}.", cosine=i / 10, ids=(i, 0), status=NodeStatus.FINISHED) for i in range(4)]
    assert tree_metrics_of(flat).correlation is None, "all are of one length"
    same = [replace(n, cosines={"clip": 0.25}) if n.sentence else n for n in TREE]
    assert tree_metrics_of(same).correlation is None, "all earn the same"


def test_pooling_over_pairs_and_prompts():
    trees = [
        TreeMetrics(3, 2, 1, 1.5, 3, -3, 0, 0.5, 0.75),
        TreeMetrics(1, 1, 0, 0.5, -1, 1, 1, None, None),
        TreeMetrics(0, 0, 0, 0.0, 0, 0, 0, -0.1, 0.25),
    ]
    assert audit.pair_metrics(trees) == pytest.approx(
        {
            "prompts_with_pairs": 2 / 3,
            "pairs": 4.0,
            "relevance_win": 3 / 4,
            "margin": 2 / 4,
            "length_gap": 2 / 4,
            "omission_gap": -2 / 4,
            "repeat_gap": 1 / 4,
            "length_correlation": 0.2,  # (0.5 - 0.1) / 2: one prompt has none
            "scorer_agreement": 0.5,
        }
    )


@pytest.mark.parametrize("trees", [[], [TreeMetrics(0, 0, 0, 0.0, 0, 0, 0, None, None)]])
def test_an_iteration_without_pairs_has_no_other_metrics(trees):
    metrics = audit.pair_metrics(trees)
    assert metrics == {"prompts_with_pairs": 0.0, "pairs": 0.0}
    (check,) = audit.checks(metrics, PAIR_BOUNDS)
    assert check.verdict is Verdict.STOP
    assert "too few prompts yield pairs" in check.reason


def with_negatives(nodes: list[Node], negatives: dict[str, float]) -> list[Node]:
    return [
        replace(n, cosines={**n.cosines, negatives_column("clip"): negatives[n.sentence]}) if n.sentence else n
        for n in nodes
    ]


def test_scorer_agreement_counts_each_sentence_once():
    # Boat above its others, fish level with them, car below: (1 + 1/2 + 0) / 3.
    nodes = with_negatives(TREE, {"A boat.": 0.2, "A fish.": 0.5, "A car.": 0.3})
    assert tree_metrics_of(nodes).scorer_agreement == pytest.approx(0.5)


def test_scorer_agreement_of_several_scorers_uses_their_sum():
    nodes = with_negatives(TREE, {"A boat.": 0.2, "A fish.": 0.4, "A car.": 0.3})
    # The second scorer takes 0.3 from the boat's lead of 0.2, and adds 0.3 to the car's -0.2.
    second = {"A boat.": (0.0, 0.3), "A fish.": (0.0, 0.0), "A car.": (0.3, 0.0)}
    both = [
        replace(
            n,
            cosines={**n.cosines, "two": second[n.sentence][0], negatives_column("two"): second[n.sentence][1]},
        )
        if n.sentence
        else n
        for n in nodes[:4]
    ]
    assert audit.tree_metrics(both, [], method(), "clip").scorer_agreement == pytest.approx(2 / 3)
    assert audit.tree_metrics(both, [], method(), "clip+two").scorer_agreement == pytest.approx(2 / 3)
    assert audit.tree_metrics(both[1:2], [], method(), "clip").scorer_agreement == 0.0
    assert audit.tree_metrics(both[1:2], [], method(), "clip+two").scorer_agreement == 1.0


def test_a_ledger_without_negative_images():
    assert tree_metrics_of(TREE).scorer_agreement is None
    assert "scorer_agreement" not in audit.pair_metrics([tree_metrics_of(TREE)])
    with pytest.raises(CsrError, match="has no score by 'clip:others'"):
        tree_metrics_of(TREE, reward={"image_score": "contrast"})


def test_relevant_sentences_are_found_by_contrast():
    # By cosine 40, 10, 50; with other images 36, 0, 48.
    nodes = with_negatives(TREE, {"A boat.": 0.36, "A car.": 0.0, "A fish.": 0.48})
    actual = tree_metrics_of(nodes, reward={"image_score": "contrast"})
    # Contrasts: boat 4, car 10, fish 2; above half of the best is the car alone. Best is car and
    # car at 10, worst boat and fish at 3.
    assert (actual.wins, actual.losses) == (1, 0)
    assert actual.omission_gap == -1
    assert actual.repeat_gap == 1, "and it is said twice"


@pytest.mark.parametrize(
    ("bound", "value", "expected"),
    [
        (Bound(0.75, 0.62, False, ""), 0.75, Verdict.GO),
        (Bound(0.75, 0.62, False, ""), 0.74, Verdict.WARN),
        (Bound(0.75, 0.62, False, ""), 0.63, Verdict.WARN),
        (Bound(0.75, 0.62, False, ""), 0.62, Verdict.STOP),
        (Bound(0.1, 0.3, True, ""), 0.1, Verdict.GO),
        (Bound(0.1, 0.3, True, ""), 0.11, Verdict.WARN),
        (Bound(0.1, 0.3, True, ""), 0.29, Verdict.WARN),
        (Bound(0.1, 0.3, True, ""), 0.3, Verdict.STOP),
        (Bound(1.0, math.inf, True, ""), 1e9, Verdict.WARN),
    ],
)
def test_verdicts_at_bounds(bound, value, expected):
    assert bound.judge(value) is expected


@pytest.mark.parametrize("metric", BOUNDS)
def test_every_bound_warns_before_it_stops(metric):
    bound = BOUNDS[metric]
    worse = 1 if bound.higher_is_worse else -1
    assert worse * bound.stop >= worse * bound.warn
    inside, beyond, at_stop = (
        audit.checks({metric: value}, BOUNDS)[0]
        for value in (bound.warn - worse * 1e-6, bound.warn + worse * 1e-6, bound.stop)
    )
    assert inside == Check(metric, inside.value, Verdict.GO, "")
    assert beyond.verdict is not Verdict.GO
    assert beyond.reason
    assert "{" not in beyond.reason
    if math.isfinite(bound.stop):
        assert at_stop.verdict is Verdict.STOP


def test_a_gap_of_0_passes():
    assert {f.verdict for f in audit.checks({"omission_gap": 0.0, "repeat_gap": 0.0}, PAIR_BOUNDS)} == {Verdict.GO}


def test_negative_length_correlations_count_like_positive_ones():
    rise, fall = (audit.checks({"length_correlation": r}, PAIR_BOUNDS)[0] for r in (1.0, -1.0))
    assert rise.verdict is fall.verdict is PAIR_BOUNDS["length_correlation"].judge(1.0)
    assert rise.verdict is not Verdict.GO
    assert "-1.00" in fall.reason


def test_metrics_without_a_bound_are_not_checked():
    assert audit.checks({"pairs": 0.0, "margin": -9.0, "length_gap": 7.0}, PAIR_BOUNDS) == []


@given(st.lists(st.sampled_from(list(Verdict))))
def test_the_most_severe_verdict_decides(verdicts):
    actual = [Check("metric", 0.0, verdict, "") for verdict in verdicts]
    expected = Verdict.STOP if Verdict.STOP in verdicts else Verdict.WARN if Verdict.WARN in verdicts else Verdict.GO
    assert audit.worst_verdict(actual) is expected


def test_checks_are_dumped_as_plain_data():
    kept = audit.dump([Check("unfinished_gain", 0.5, Verdict.STOP, "why")])
    assert kept == [{"metric": "unfinished_gain", "value": 0.5, "verdict": "stop", "reason": "why", "n": None}]
    assert type(kept[0]["verdict"]) is str


BASE = {"sentences": 5.0, "relevance": 30.0, "repeats": 0.2, "complete": 0.75}


def test_response_metrics_compare_with_the_base_model():
    now = {"sentences": 4.0, "relevance": 31.5, "repeats": 0.5, "complete": 0.5}
    assert audit.response_metrics(BASE, now, -2.0) == pytest.approx(
        {
            "sentences_ratio": 0.8,
            "relevance_gain": 1.5,
            "repeats_gain": 0.3,
            "unfinished_gain": 0.25,
            "chosen_drop": 2.0,
        }
    )


def test_a_policy_equal_to_the_base_passes():
    rambling = BASE | {"complete": 0.0, "repeats": 3.0, "relevance": 0.0}
    for base in (BASE, rambling):
        assert {f.verdict for f in audit.checks(audit.response_metrics(base, base, 0.0), RESPONSE_BOUNDS)} == {
            Verdict.GO
        }


def test_a_collapsed_policy_is_stopped_but_not_measured_against_a_collapsed_base():
    silent = {"sentences": 0.0, "relevance": 0.0, "repeats": 0.0, "complete": 1.0}
    actual = audit.checks(audit.response_metrics(BASE, silent, None), RESPONSE_BOUNDS)
    assert {f.metric for f in actual if f.verdict is Verdict.STOP} >= {"sentences_ratio", "relevance_gain"}
    assert "chosen_drop" not in {f.metric for f in actual}
    assert "sentences_ratio" not in audit.response_metrics(silent, BASE, None)
    assert (
        audit.worst_verdict(audit.checks(audit.response_metrics(silent, silent, None), RESPONSE_BOUNDS)) is Verdict.GO
    )


def test_a_metric_that_became_undefined_stops():
    mute = BASE | {"relevance": None}
    metrics = audit.response_metrics(BASE, mute, None)
    assert "relevance_gain" not in metrics
    (stopped,) = [check for check in audit.response_checks(metrics, BASE, mute) if check.verdict is Verdict.STOP]
    assert stopped == Check("relevance_gain", None, Verdict.STOP, "responses: relevance was 30 and is undefined now")
    back = audit.response_checks(audit.response_metrics(mute, BASE, None), mute, BASE)
    assert {check.verdict for check in back} == {Verdict.GO}


GOOD_PAIRS = {
    "pairs": 40.0,
    "prompts_with_pairs": 0.9,
    "relevance_win": 0.95,
    "omission_gap": -0.1,
    "repeat_gap": -0.1,
    "scorer_agreement": 0.9,
    "length_correlation": 0.2,
}


@pytest.mark.parametrize(
    ("missing", "first", "stops"),
    [
        ("relevance_win", {}, True),
        ("relevance_win", GOOD_PAIRS, True),
        ("scorer_agreement", GOOD_PAIRS, True),
        ("scorer_agreement", {}, False),
        ("length_correlation", GOOD_PAIRS, False),
        (None, GOOD_PAIRS, False),
    ],
)
def test_pairs_must_have_their_metrics(missing, first, stops):
    metrics = {name: value for name, value in GOOD_PAIRS.items() if name != missing}
    found = [check for check in audit.pair_checks(metrics, first) if check.verdict is not Verdict.GO]
    assert [(check.metric, check.value) for check in found] == ([(missing, None)] if stops else [])
    assert all("undefined" in check.reason for check in found)


def test_without_pairs_only_their_number_stops():
    found = audit.pair_checks({"pairs": 0.0, "prompts_with_pairs": 0.0}, GOOD_PAIRS)
    assert [check.metric for check in found] == ["prompts_with_pairs"]


# What must fail, and what must not.


def random_trees(number: int = 200) -> list[list[Node]]:
    """Create trees of five complete responses with random relevance."""
    rng = random.Random(0)
    return [
        [
            node(
                str(i),
                f"Thing {i}.",
                cosine=rng.uniform(0, 0.5),
                logprobs=(-3 * rng.random(),),
                ids=(i, 0),
                status=NodeStatus.FINISHED,
                finish=Finish.EOS,
                prompt_id=f"prompt-{tree}",
            )
            for i in range(1, 6)
        ]
        for tree in range(number)
    ]


@pytest.mark.parametrize("between", ["responses", "siblings"])
def test_random_pairs_are_stopped(between):
    pairs = {"between": between, "per_prompt": 2}
    at_random = [tree_metrics_of(tree, 1.0, pairs=pairs | {"selection": "random"}) for tree in random_trees()]
    by_reward = [tree_metrics_of(tree, 1.0, pairs=pairs) for tree in random_trees()]
    assert audit.pair_metrics(at_random)["pairs"] == 400
    # 400 pairs, two a prompt: a standard error of at most 0.036.
    assert audit.pair_metrics(at_random)["relevance_win"] == pytest.approx(0.5, abs=0.1)
    assert verdict_of(at_random, "relevance_win") is Verdict.STOP
    assert audit.pair_metrics(by_reward)["relevance_win"] == 1.0
    assert verdict_of(by_reward, "relevance_win") is Verdict.GO


@pytest.mark.parametrize("between", ["responses", "siblings"])
def test_a_language_prior_that_prefers_false_sentences_is_stopped(between):
    nodes = [
        node("0", "A boat.", cosine=0.1, logprobs=(-0.1,), ids=(1,), status=NodeStatus.FINISHED, finish=Finish.EOS),
        node("1", "A fish.", cosine=0.4, logprobs=(-3.0,), ids=(2,), status=NodeStatus.FINISHED, finish=Finish.EOS),
    ]
    by_prior, by_image = ([tree_metrics_of(nodes, weight, pairs={"between": between})] for weight in (0.0, 1.0))
    assert audit.pair_metrics(by_prior)["relevance_win"] == 0.0
    assert verdict_of(by_prior, "relevance_win") is Verdict.STOP
    assert audit.pair_metrics(by_image)["relevance_win"] == 1.0
    assert verdict_of(by_image, "relevance_win") is Verdict.GO


SHORT_OR_LONG = [
    node("0", "A boat.", cosine=0.50, ids=(1,), status=NodeStatus.TOP),
    node("1", "A car.", cosine=0.10, ids=(2,)),
    node("0.0", "", cosine=None, ids=(0,), status=NodeStatus.FINISHED, finish=Finish.EOS),
    node("0.1", " A fish.", cosine=0.40, ids=(3, 0), status=NodeStatus.FINISHED, finish=Finish.EOS),
]
"""The boat alone, or boat and fish, both of them there."""


def test_a_reward_that_prefers_short_responses_is_noticed():
    by_mean = [tree_metrics_of(SHORT_OR_LONG)]  # 50 against 45
    actual = audit.pair_metrics(by_mean)
    assert actual["omission_gap"] == 1.0
    assert actual["length_gap"] == -1.0
    assert verdict_of(by_mean, "omission_gap") is not Verdict.GO
    by_sum = [tree_metrics_of(SHORT_OR_LONG, reward={"response": "sum"})]  # 50 against 90
    assert audit.pair_metrics(by_sum)["omission_gap"] == -1.0
    assert verdict_of(by_sum, "omission_gap") is Verdict.GO


def chain(num_sentences: int) -> list[Node]:
    """Create a tree in which a response can end after every sentence, with similar rewards."""
    nodes, path = [], ""
    for i in range(num_sentences):
        before, path = path, f"{path}.0".lstrip(".")
        nodes.append(node(path, f" Thing {i}.", cosine=0.3 + 0.01 * (i % 2), ids=(i + 1,), status=NodeStatus.TOP))
        if before:
            nodes.append(
                node(
                    f"{before}.1",
                    "",
                    cosine=None,
                    ids=(0,),
                    status=NodeStatus.FINISHED,
                    finish=Finish.EOS,
                    logprobs=(-1.0,),
                )
            )
    return nodes


def test_a_reward_that_grows_with_length_is_noticed():
    by_sum = [tree_metrics_of(chain(6), reward={"response": "sum"})]
    assert audit.pair_metrics(by_sum)["length_correlation"] == pytest.approx(1.0, abs=0.01)
    assert verdict_of(by_sum, "length_correlation") is PAIR_BOUNDS["length_correlation"].judge(1.0)
    by_mean = [tree_metrics_of(chain(6), reward={"response": "mean"})]
    assert abs(audit.pair_metrics(by_mean)["length_correlation"]) < 0.75


def test_a_reward_for_repetition_is_noticed():
    # The boat is the best sentence, so by sum the response that says it twice wins.
    nodes = [
        node("0", "A boat.", cosine=0.50, ids=(1,), status=NodeStatus.TOP),
        node("0.0", " A boat.", cosine=0.50, ids=(1, 0), status=NodeStatus.FINISHED, finish=Finish.EOS),
        node("0.1", " A fish.", cosine=0.40, ids=(3, 0), status=NodeStatus.FINISHED, finish=Finish.EOS),
    ]
    by_sum = [tree_metrics_of(nodes, reward={"response": "sum"})]
    assert audit.pair_metrics(by_sum)["repeat_gap"] == 1.0
    assert verdict_of(by_sum, "repeat_gap") is not Verdict.GO
    at_a_cost = [tree_metrics_of(nodes, reward={"response": "sum", "repeat_penalty": 2.0})]  # 100 - 20 against 90
    assert audit.pair_metrics(at_a_cost)["repeat_gap"] == -1.0
