"""Test pairs on hand-worked trees, their properties, and the negative control."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csr_vlm.core.records import Finish, Node, NodeStatus, Pair, negatives_column
from csr_vlm.method.pairs import make_pairs, responses
from csr_vlm.method.search import search
from csr_vlm.store import tables
from tests.unit.builders import method, node, prompt
from tests.unit.test_search import RandomModel

# Lambda 1, so R(s) is 100 times the cosine; R(y) is the mean over sentences.
TREE = [
    node("0", "A boat.", cosine=0.30, ids=(1, 2), logprobs=(-1.0, -2.0), status=NodeStatus.TOP),
    node("1", "A car", cosine=0.05, ids=(8,), logprobs=(-3.0,), status=NodeStatus.TRUNCATED, finish=Finish.LENGTH),
    node("2", "A tree.", cosine=0.60, ids=(9,), logprobs=(-1.5,), status=NodeStatus.PRUNED),
    node("0.0", " A fish.", cosine=0.10, ids=(3, 4, 0), logprobs=(-0.5, -0.25, -0.125), status=NodeStatus.FINISHED),
    node("0.1", "", cosine=None, ids=(0,), logprobs=(-0.75,), status=NodeStatus.FINISHED, finish=Finish.EOS),
    node("0.2", " A bird.", cosine=0.24, ids=(5, 0), logprobs=(-4.0, -0.5), status=NodeStatus.FINISHED),
]


def make_pair(*arguments):
    """Return the first pair of a prompt, or the reason why it has none."""
    actual = make_pairs(*arguments)
    return actual if isinstance(actual, str) else actual[0]


def pair_of(nodes: list[Node], weight: float = 1.0, seed: int = 0, **sections: object) -> Pair | str:
    return make_pair(prompt(nodes[0].prompt_id), nodes, method(weight, **sections), "clip", seed)


def test_responses_are_the_paths_to_the_leaves():
    fish, end, bird = (r for r in responses(TREE, method(1.0), "clip") if r.complete)
    assert (fish.node_id, end.node_id, bird.node_id) == ("0.0", "0.1", "0.2")
    assert fish.text == "A boat. A fish."
    assert fish.token_ids == (1, 2, 3, 4, 0)
    assert fish.logprob == pytest.approx(-1 - 2 - 0.5 - 0.25 - 0.125)
    assert fish.reward == pytest.approx(20.0)  # (30 + 10) / 2
    assert fish.num_sentences == 2
    assert end.text == "A boat."
    assert end.token_ids == (1, 2, 0), "the end of the response is part of what is learned"
    assert end.logprob == pytest.approx(-3.75)
    assert end.reward == pytest.approx(30.0)
    assert end.num_sentences == 1
    assert bird.reward == pytest.approx(27.0)


def test_truncated_responses_are_marked_incomplete():
    assert {r.node_id: r.complete for r in responses(TREE, method(), "clip")} == {
        "0.0": True,
        "0.1": True,
        "0.2": True,
        "1": False,
    }


def test_extremes():
    pair = pair_of(TREE)
    assert isinstance(pair, Pair)
    assert (pair.chosen.node_id, pair.rejected.node_id) == ("0.1", "0.0")
    assert pair.margin == pytest.approx(10.0)
    assert pair.iteration == 1
    assert pair.prompt == prompt()


def test_truncated_responses_are_used_only_if_allowed():
    pair = pair_of(TREE, pairs={"require_complete": False})
    assert isinstance(pair, Pair)
    assert (pair.chosen.node_id, pair.rejected.node_id) == ("0.1", "1")


def test_with_a_sum_the_longer_response_is_chosen():
    pair = pair_of(TREE, reward={"response": "sum"})
    assert isinstance(pair, Pair)
    assert (pair.chosen.node_id, pair.rejected.node_id) == ("0.2", "0.1")  # 54 against 30


def test_fewer_than_two_complete_responses():
    assert pair_of(TREE[:4]) == "incomplete"
    assert pair_of(TREE[:3]) == "incomplete"
    assert isinstance(pair_of(TREE[:5]), Pair)


@pytest.mark.parametrize("selection", ["extremes", "random"])
def test_identical_responses_yield_no_pair(selection):
    same = [
        node("0", "A boat.", cosine=0.3, ids=(1,), status=NodeStatus.FINISHED),
        node("1", " A boat. ", cosine=0.1, ids=(2,), status=NodeStatus.FINISHED),
    ]
    assert pair_of(same, pairs={"selection": selection}) == "identical"


@pytest.mark.parametrize(("min_margin", "dropped"), [(0.0, False), (0.18, False), (0.19, True), (9, True)])
def test_min_margin_is_in_units_of_the_spread(min_margin, dropped):
    # The responses differ by 10, the sentences lie between 5 and 60.
    assert (pair_of(TREE, pairs={"min_margin": min_margin}) == "margin") is dropped


def test_equal_rewards_yield_no_pair_even_without_a_min_margin():
    equal = [node(str(i), f"Sentence {i}.", status=NodeStatus.FINISHED) for i in range(3)]
    assert pair_of(equal) == "margin"


def test_random_selection_ignores_the_min_margin():
    assert isinstance(pair_of(TREE, pairs={"selection": "random", "min_margin": 99}), Pair)


def random_tree(salt: int, prompt_id: str = "p", num_leaves: int = 6) -> list[Node]:
    rng = random.Random(f"{salt} {prompt_id}")
    return [
        node(
            str(i),
            f"Sentence {i}.",
            cosine=rng.uniform(0, 0.5),
            logprobs=(-3 * rng.random(), -rng.random()),
            status=rng.choice([NodeStatus.FINISHED, NodeStatus.FINISHED, NodeStatus.TRUNCATED, NodeStatus.PRUNED]),
            prompt_id=prompt_id,
        )
        for i in range(num_leaves)
    ]


@given(
    st.integers(0, 10**6),
    st.floats(0, 1),
    st.sampled_from(["weighted", "sibling_rank"]),
    st.booleans(),
)
def test_chosen_is_the_best_and_rejected_the_worst(salt, weight, fusion, require_complete):
    nodes, settings = random_tree(salt), {"fusion": fusion}
    pair = pair_of(nodes, weight, reward=settings, pairs={"require_complete": require_complete})
    eligible = [
        r for r in responses(nodes, method(weight, reward=settings), "clip") if r.complete or not require_complete
    ]
    if isinstance(pair, str):
        assert len(eligible) < 2 or len({r.reward for r in eligible}) == 1
        return
    assert pair.margin > 0
    assert pair.chosen in eligible
    assert pair.rejected in eligible
    assert all(pair.rejected.reward <= r.reward <= pair.chosen.reward for r in eligible)


def all_pairs(seed: int, selection: str, num_prompts: int = 400) -> list[Pair]:
    actual = [
        pair_of(random_tree(0, f"prompt-{i}"), 1.0, seed, pairs={"selection": selection}) for i in range(num_prompts)
    ]
    return [pair for pair in actual if isinstance(pair, Pair)]


def test_random_selection_depends_on_the_seed():
    first, again, other = (all_pairs(seed, "random") for seed in (0, 0, 1))
    assert first == again
    same = fmean(a == b for a, b in zip(first, other, strict=True))
    assert same < 0.3, "two responses of about four, in order: chance alone gives a tenth or so"


def test_extremes_do_not_depend_on_the_seed():
    assert all_pairs(0, "extremes") == all_pairs(1, "extremes")


def test_random_selection_has_a_mean_margin_of_0():
    pairs = all_pairs(0, "random")
    margins = [pair.margin for pair in pairs]
    assert len(margins) > 300
    assert abs(fmean(margins)) < 3 * stdev(margins) / math.sqrt(len(margins))
    assert stdev(margins) > 5
    extremes = [pair.margin for pair in all_pairs(0, "extremes")]
    assert fmean(extremes) > 20
    assert fmean(extremes) > 10 * stdev(extremes) / math.sqrt(len(extremes)), "the control can fail"


@pytest.mark.parametrize("per_prompt", [1, 2, 3])
def test_random_siblings_have_a_mean_margin_of_0_for_any_limit(per_prompt):
    settings = {"between": "siblings", "selection": "random", "per_prompt": per_prompt, "per_node": 3}
    margins = []
    for i in range(200):
        actual = make_pairs(prompt(), random_tree(0, f"prompt-{i}"), method(1.0, pairs=settings), "clip", 0)
        margins += [pair.margin for pair in actual]
    assert len(margins) > 195 * per_prompt
    assert abs(fmean(margins)) < 3 * stdev(margins) / math.sqrt(len(margins) / per_prompt)


def test_pairs_can_be_derived_again_from_the_ledger(tmp_path):
    prompts = [prompt(f"prompt-{i}") for i in range(40)]
    model = RandomModel(salt=7)
    trees = search(prompts, model.propose, model.score, method(0.9), iteration=2, seed=0, scorer="clip")
    rounds = len(model.asked)
    tables.write_nodes(tmp_path / "part.parquet", [node for tree in trees for node in tree.nodes])

    def pairs(weight: float) -> list[Pair | str]:
        read = tables.read_trees(tmp_path / "part.parquet")
        return [make_pair(p, nodes, method(weight), "clip", 0) for p, (_, nodes) in zip(prompts, read, strict=True)]

    def ends(actual: list[Pair | str]) -> list[object]:
        return [(p.chosen.node_id, p.rejected.node_id) if isinstance(p, Pair) else p for p in actual]

    in_memory = [make_pair(t.prompt, t.nodes, method(0.9), "clip", 0) for t in trees]
    assert ends(pairs(0.9)) == ends(in_memory), "the ledger holds all that pairs need"
    assert ends(pairs(0.9)) != ends(pairs(0.0)), "another lambda chooses otherwise"
    assert len(model.asked) == rounds


def test_the_best_response_is_compared_with_others_spread_over_the_ranking():
    # Means of R_I: boat alone 30, boat and bird 27, boat and fish 20.
    actual = make_pairs(prompt(), TREE, method(1.0, pairs={"per_prompt": 2}), "clip", 0)
    assert [(p.chosen.node_id, p.rejected.node_id) for p in actual] == [("0.1", "0.0"), ("0.1", "0.2")]
    more = make_pairs(prompt(), TREE, method(1.0, pairs={"per_prompt": 9}), "clip", 0)
    assert more == actual
    only_wide = make_pairs(prompt(), TREE, method(1.0, pairs={"per_prompt": 9, "min_margin": 0.1}), "clip", 0)
    assert [p.rejected.node_id for p in only_wide] == ["0.0"]


@given(st.integers(1, 12), st.integers(1, 6))
def test_rejected_responses_are_distinct_and_include_the_worst(length, number):
    leaves = [
        node(str(i), f"Thing {i}.", cosine=i / 20, ids=(i, 0), status=NodeStatus.FINISHED, finish=Finish.EOS)
        for i in range(length + 1)
    ]
    actual = make_pairs(prompt(), leaves, method(1.0, pairs={"per_prompt": number}), "clip", 0)
    rejected = [pair.rejected.node_id for pair in actual]
    assert rejected[0] == "0"
    assert len(set(rejected)) == len(rejected) == min(number, length)
    assert str(length) not in rejected


# The same tree by sentences. Under the root: boat 30, tree 60 (the car was cut off).
# Under the boat: fish 10, the end 0, bird 24.
def siblings_of(nodes: list[Node], weight: float = 1.0, **config: object) -> list[Pair] | str:
    settings = {"between": "siblings", "per_prompt": 9, "look_ahead": False} | config
    return make_pairs(prompt(), nodes, method(weight, pairs=settings), "clip", 0)


def test_siblings_share_their_prefix():
    actual = siblings_of(TREE)
    assert [(p.chosen.node_id, p.rejected.node_id, round(p.margin, 6)) for p in actual] == [
        ("2", "0", 30.0),
        ("0.2", "0.1", 24.0),
        ("0.2", "0.0", 14.0),
    ]
    bird, end = actual[1].chosen, actual[1].rejected
    assert bird.text == "A boat. A bird."
    assert bird.token_ids == (1, 2, 5, 0)
    assert bird.logprob == pytest.approx(-1 - 2 - 4 - 0.5)
    assert end.token_ids == (1, 2, 0)
    assert end.reward == 0.0, "to end is worth nothing"
    assert (bird.num_sentences, end.num_sentences) == (2, 1)


def with_negatives(nodes: list[Node], negatives: float = 0.0) -> list[Node]:
    """Give each sentence the same mean cosine over negative images."""
    return [replace(n, cosines=n.cosines | {negatives_column("clip"): negatives}) if n.sentence else n for n in nodes]


HALF_BEST = {"image_score": "contrast", "baseline": "half_best"}


def test_ending_is_preferred_to_sentences_below_the_baseline():
    # Half of the best contrast, 60, is 30: bird and fish have rewards of -6 and -20, ending 0.
    settings = method(1.0, reward=HALF_BEST, pairs={"between": "siblings", "per_prompt": 9})
    actual = make_pairs(prompt(), with_negatives(TREE), settings, "clip", 0)
    ends = [(p.chosen.node_id, p.rejected.node_id) for p in actual if p.chosen.node_id.startswith("0.")]
    assert ends == [("0.1", "0.0"), ("0.1", "0.2")]


def test_siblings_per_node_and_prompt():
    assert [(p.chosen.node_id, p.rejected.node_id) for p in siblings_of(TREE, per_node=1)] == [
        ("2", "0"),
        ("0.2", "0.1"),
    ]
    assert [(p.chosen.node_id, p.rejected.node_id) for p in siblings_of(TREE, per_prompt=1)] == [("2", "0")]


def test_truncated_sentences_are_used_only_if_allowed():
    actual = siblings_of(TREE, require_complete=False)
    assert ("2", "1") in [(p.chosen.node_id, p.rejected.node_id) for p in actual]


def test_identical_siblings_yield_no_pair():
    same = [node("0", "A boat.", ids=(1,)), node("1", " A boat. ", cosine=0.1, ids=(2,))]
    assert siblings_of(same) == "identical"
    goes_on_or_not = [node("0", "A boat.", ids=(1,)), node("1", "A boat.", ids=(1, 0), status=NodeStatus.FINISHED)]
    assert siblings_of(goes_on_or_not) == "margin", "they differ in ending; the sentence earns the same"


@given(st.integers(0, 10**6), st.sampled_from(["extremes", "random"]), st.integers(1, 5), st.integers(1, 20))
def test_sibling_pairs_differ_in_the_last_sentence_only(salt, selection, per_node, per_prompt):
    model = RandomModel(salt=salt)
    settings = {"between": "siblings", "selection": selection, "per_node": per_node, "per_prompt": per_prompt}
    method_config = method(0.9, pairs=settings)
    (tree,) = search([prompt()], model.propose, model.score, method_config, iteration=1, seed=0, scorer="clip")
    actual = make_pairs(prompt(), tree.nodes, method_config, "clip", 0)
    if isinstance(actual, str):
        return
    assert len(actual) <= per_prompt
    parents = [pair.chosen.node_id.rpartition(".")[0] for pair in actual]
    assert parents == [pair.rejected.node_id.rpartition(".")[0] for pair in actual]
    assert max(parents.count(parent) for parent in parents) <= per_node
    by_id = {n.node_id: n for n in tree.nodes}
    for pair in actual:
        before = len(pair.chosen.token_ids) - len(by_id[pair.chosen.node_id].token_ids)
        assert pair.chosen.token_ids[:before] == pair.rejected.token_ids[:before]
        assert pair.margin > 0 or selection == "random"


# A boat (30) and a car (28); who speaks of the boat goes on to the car (28) and ends, who
# starts with the car finds nothing but a fish (-20) or the end.
ORDERED = [
    node("0", "A boat.", cosine=0.30, ids=(1,), status=NodeStatus.TOP),
    node("1", "A car.", cosine=0.28, ids=(2,), status=NodeStatus.TOP),
    node("2", "A bird.", cosine=0.29, ids=(3,), status=NodeStatus.PRUNED),
    node("0.0", "A car.", cosine=0.28, ids=(2, 0), status=NodeStatus.FINISHED),
    node("1.0", "", cosine=None, ids=(0,), status=NodeStatus.FINISHED, finish=Finish.EOS),
    node("1.1", "A fish.", cosine=0.01, ids=(4, 0), status=NodeStatus.FINISHED),
]


def test_look_ahead_penalizes_omissions():
    actual = siblings_of(ORDERED, look_ahead=True, min_margin=0.5)
    (first,) = [p for p in actual if "." not in p.chosen.node_id]
    assert (first.chosen.node_id, first.rejected.node_id) == ("0", "1")
    assert first.chosen.reward == pytest.approx(30 + 28)
    assert first.rejected.reward == pytest.approx(28 + 1)
    assert siblings_of(ORDERED, min_margin=0.5) == "margin", "2 alone is none"


def test_siblings_that_were_not_expanded_are_compared_without_look_ahead():
    actual = siblings_of(ORDERED, look_ahead=True)
    (bird,) = [p for p in actual if p.rejected.node_id == "2"]
    assert bird.chosen.node_id == "0"
    assert (bird.chosen.reward, bird.rejected.reward) == (pytest.approx(30), pytest.approx(29))


def test_ending_after_a_true_sentence_is_preferred_to_continuing_with_a_false_one():
    nodes = [
        node("0", "A boat.", cosine=0.30, ids=(1,), status=NodeStatus.TOP),
        node("1", "A boat.", cosine=0.30, ids=(1, 0), status=NodeStatus.FINISHED, finish=Finish.EOS),
        node("0.0", "A fish.", cosine=0.05, ids=(4, 0), status=NodeStatus.FINISHED),
    ]
    # Half of the best contrast is 15, so the boat's reward is 15 and the fish's -10.
    settings = method(1.0, reward=HALF_BEST, pairs={"between": "siblings", "per_prompt": 9})
    actual = make_pairs(prompt(), with_negatives(nodes), settings, "clip", 0)
    assert [(p.chosen.node_id, p.rejected.node_id) for p in actual] == [("1", "0")]
    assert actual[0].chosen.reward == pytest.approx(15.0)
    assert actual[0].rejected.reward == pytest.approx(15.0 - 10.0)
