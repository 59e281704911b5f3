"""Compare rewards with numbers worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from csr_vlm.config.schema import RewardConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Node
from csr_vlm.method.reward import (
    bag_of_words,
    image_score,
    path_ids,
    repeats_earlier,
    response_reward,
    reward_scale,
    sentence_rewards,
    text_score,
)
from tests.unit.builders import method, node

HALF, QUARTER = math.log(0.5), math.log(0.25)


def totals(nodes: list[Node], weight: float, **reward: object) -> dict[str, float]:
    rewards = sentence_rewards(nodes, method(weight, reward=reward), "clip")
    return {node_id: reward.total for node_id, reward in rewards.items()}


@pytest.mark.parametrize(
    ("kind", "scale", "expected"),
    [
        ("product", 1.0, 0.125),  # 0.5 * 0.25
        ("product", 100.0, 12.5),
        ("geometric_mean", 1.0, 0.3535534),  # sqrt(0.125)
        ("geometric_mean", 100.0, 35.35534),
        ("mean_logprob", 1.0, -1.0397208),  # (-0.6931472 - 1.3862944) / 2
        ("mean_logprob", 10.0, -10.397208),
    ],
)
def test_text_score(kind, scale, expected):
    config = RewardConfig(text_score=kind, text_scale=scale)
    assert text_score(node("0", logprobs=(HALF, QUARTER)), config) == pytest.approx(expected, abs=1e-6)


def test_product_decreases_with_length_and_geometric_mean_does_not():
    short, long = node("0", logprobs=(HALF,)), node("1", logprobs=(HALF,) * 10)
    product, mean = (RewardConfig(text_score=kind, text_scale=1.0) for kind in ("product", "geometric_mean"))
    assert text_score(short, product) == pytest.approx(0.5)
    assert text_score(long, product) == pytest.approx(0.5**10)
    assert text_score(short, mean) == pytest.approx(text_score(long, mean))


def test_product_of_a_very_long_sentence_is_zero_rather_than_an_error():
    assert text_score(node("0", logprobs=(-20.0,) * 70), RewardConfig(text_score="product")) == 0.0


@pytest.mark.parametrize(("cosine", "expected"), [(0.27, 27.0), (1.0, 100.0), (0.0, 0.0), (-0.1, 0.0)])
def test_image_score(cosine, expected):
    assert image_score(node("0", cosine=cosine), "clip", RewardConfig()) == pytest.approx(expected)


@pytest.mark.parametrize("cosine", [None, math.nan, math.inf, -math.inf])
def test_a_missing_or_broken_cosine_names_the_prompt_and_the_sentence(cosine):
    broken = node("2.1", cosine=cosine, prompt_id="photo-17")
    with pytest.raises(CsrError, match=r"photo-17.*2\.1") as caught:
        sentence_rewards([node("0"), broken], method(), "clip")
    assert "clip" in caught.value.message


def test_another_scorers_column_is_not_used_instead():
    with pytest.raises(CsrError, match="siglip"):
        image_score(node("0", cosine=0.3), "siglip", RewardConfig())


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (0.9, 24.3125),  # 0.9 * 27 + 0.1 * 0.125
        (0.5, 13.5625),
        (0.0, 0.125),
        (1.0, 27.0),
    ],
)
def test_weighted_fusion_is_equation_4(weight, expected):
    sentence = node("0", cosine=0.27, logprobs=(HALF, QUARTER))
    assert totals([sentence], weight, text_score="product", text_scale=1.0)["0"] == pytest.approx(expected)


def test_lambda_changes_the_order():
    likely, relevant = node("0", cosine=0.10, logprobs=(-0.1,)), node("1", cosine=0.30, logprobs=(-3.0,))
    by_text, by_image = totals([likely, relevant], 0.0), totals([likely, relevant], 1.0)
    assert by_text["0"] > by_text["1"]
    assert by_image["0"] < by_image["1"]


def test_both_parts_are_reported_with_the_total():
    reward = sentence_rewards([node("0", cosine=0.27, logprobs=(HALF,))], method(0.25), "clip")["0"]
    assert reward.image == pytest.approx(27.0)
    assert reward.text == pytest.approx(50.0)  # 100 * 0.5
    assert reward.total == pytest.approx(0.25 * 27 + 0.75 * 50)


def test_sibling_rank_fusion():
    nodes = [
        node("0", cosine=0.30, logprobs=(-3.0,)),  # image 1/3, text 3/3
        node("1", cosine=0.20, logprobs=(-1.0,)),  # image 2/3, text 1/3
        node("2", cosine=0.10, logprobs=(-2.0,)),  # image 3/3, text 2/3
        node("1.0", cosine=0.90, logprobs=(-0.1,)),  # without siblings: 1 and 1
    ]
    actual = totals(nodes, 0.9, fusion="sibling_rank", text_score="mean_logprob")
    assert actual["0"] == pytest.approx(-(0.9 / 3 + 0.1))
    assert actual["1"] == pytest.approx(-(0.9 * 2 / 3 + 0.1 / 3))
    assert actual["2"] == pytest.approx(-(0.9 + 0.1 * 2 / 3))
    assert actual["1.0"] == pytest.approx(-1.0)


def test_sibling_rank_ties_go_to_the_earlier_sibling():
    actual = totals([node("0"), node("1")], 0.5, fusion="sibling_rank")
    assert actual == {"0": pytest.approx(-0.5), "1": pytest.approx(-1.0)}


@pytest.mark.parametrize(("kind", "expected"), [("sum", 6.0), ("mean", 2.0), ("mean_plus_one", 1.5)])
def test_response_reward(kind, expected):
    assert response_reward([1.0, 2.0, 3.0], RewardConfig(response=kind)) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["sum", "mean", "mean_plus_one"])
def test_a_response_without_sentences_has_reward_0(kind):
    assert response_reward([], RewardConfig(response=kind)) == 0.0


def test_a_sum_of_positive_rewards_prefers_length_and_a_mean_does_not():
    short, long = [20.0, 20.0], [18.0, 18.0, 18.0]
    by_sum, by_mean = RewardConfig(response="sum"), RewardConfig(response="mean")
    assert response_reward(long, by_sum) > response_reward(short, by_sum)
    assert response_reward(long, by_mean) < response_reward(short, by_mean)


REPEATING = [
    node("0", "A cat sits.", cosine=0.10),
    node("0.0", " Sits a CAT!", cosine=0.30),  # the words of 0 again
    node("0.1", " A dog.", cosine=0.20),
    node("1", "A cat sits.", cosine=0.15),  # the words of 0 on another path
]


def test_repeat_penalty():
    # The distinct sentences earn 10, 20, 15, a spread of 10; the penalty is half of it.
    assert totals(REPEATING, 1.0) == pytest.approx({"0": 10, "0.0": 30, "0.1": 20, "1": 15})
    assert totals(REPEATING, 1.0, repeat_penalty=0.5) == pytest.approx({"0": 10, "0.0": 25, "0.1": 20, "1": 15})


def test_repeats_are_found_along_the_path_only():
    by_id = {item.node_id: item for item in REPEATING}
    assert [repeats_earlier(item, by_id) for item in REPEATING] == [False, True, False, False]


def test_repeats_count_words():
    assert bag_of_words("The cat, the DOG.") == ("cat", "dog", "the", "the")
    assert bag_of_words("A red car and a blue car.") != bag_of_words("A red car and a blue one.")


def test_a_node_without_a_sentence_has_no_reward_and_affects_no_other():
    nodes = [node("0", cosine=0.1), node("1", cosine=0.3)]
    ending = node("0.0", "  ", cosine=None, logprobs=(-50.0,))
    for fusion in ("weighted", "sibling_rank"):
        alone = totals(nodes, 0.5, fusion=fusion, repeat_penalty=1.0)
        assert totals([*nodes, ending], 0.5, fusion=fusion, repeat_penalty=1.0) == alone
        assert "0.0" not in alone


def test_an_empty_tree_has_no_rewards():
    for fusion in ("weighted", "sibling_rank"):
        assert totals([], 0.5, fusion=fusion, repeat_penalty=1.0) == {}


def test_path_ids():
    assert path_ids("2") == ["2"]
    assert path_ids("2.0.13") == ["2", "2.0", "2.0.13"]


scores = st.tuples(st.floats(-1, 1), st.lists(st.floats(-30, 0), min_size=1, max_size=5))


@given(st.lists(scores, min_size=1, max_size=8), st.floats(0, 1), st.sampled_from(["none", "half_best"]))
def test_rewards_do_not_depend_on_the_order_of_the_nodes(scored, weight, baseline):
    nodes = [with_negatives(str(i), c, 0.1, logprobs=tuple(lps)) for i, (c, lps) in enumerate(scored)]
    config = {"image_score": "contrast", "baseline": baseline}
    assert totals(nodes, weight, **config) == pytest.approx(totals(nodes[::-1], weight, **config))


@given(st.lists(scores, min_size=2, max_size=8), st.floats(0, 1))
def test_weighted_rewards_stay_within_their_units(scored, weight):
    nodes = [node(str(i), cosine=c, logprobs=tuple(lps)) for i, (c, lps) in enumerate(scored)]
    assert all(-1e-9 <= total <= 100 + 1e-9 for total in totals(nodes, weight).values())


def with_negatives(node_id: str, cosine: float, negatives: float, **fields: object) -> Node:
    """Make a node with a mean cosine over negative images."""
    scored = node(node_id, f"Sentence {node_id}.", cosine=cosine, **fields)
    return replace(scored, cosines={"clip": cosine, "clip:others": negatives})


CONTRAST = {"image_score": "contrast", "baseline": "half_best"}


def test_contrast_is_the_cosine_above_the_mean_over_negative_images():
    config = RewardConfig(image_score="contrast")
    assert image_score(with_negatives("0", 0.30, 0.10), "clip", config) == pytest.approx(20.0)
    assert image_score(with_negatives("0", 0.05, 0.10), "clip", config) == pytest.approx(-5.0), "not clipped at 0"
    with pytest.raises(CsrError, match="no score by 'clip:others'") as error:
        image_score(node("0"), "clip", config)
    assert "scorer.others" in error.value.hint


def test_half_best_subtracts_half_of_the_best_contrast():
    # Contrasts 20, 16 and -4; at lambda 1 the baseline is half of the best, 10.
    nodes = [with_negatives("0", 0.30, 0.10), with_negatives("1", 0.26, 0.10), with_negatives("2", 0.06, 0.10)]
    assert totals(nodes, 1.0, **CONTRAST) == pytest.approx({"0": 10, "1": 6, "2": -14})
    # At lambda 0.5 the mean of R_T is subtracted too: 100 / e for all, so R_T contributes 0.
    assert totals(nodes, 0.5, text_scale=100, **CONTRAST) == pytest.approx({"0": 5, "1": 3, "2": -7})


def test_half_best_rewards_every_sentence_if_all_are_good():
    good = [with_negatives("0", 0.30, 0.10), with_negatives("1", 0.26, 0.10)]
    assert min(totals(good, 1.0, **CONTRAST).values()) > 0


def test_the_scale_includes_a_sentence_unrelated_to_the_image():
    method_ = method(1.0, reward=CONTRAST)
    good = [with_negatives("0", 0.30, 0.10), with_negatives("1", 0.26, 0.10)]
    # Totals 10 and 6; a sentence of contrast 0 would be at -10.
    assert reward_scale(sentence_rewards(good, method_, "clip").values(), method_) == pytest.approx(20.0)
    default = method(1.0)
    assert reward_scale(sentence_rewards(good, default, "clip").values(), default) == pytest.approx(4.0)
    assert reward_scale([], default) == 0.0


def test_half_best_requires_a_contrast():
    with pytest.raises(ValidationError, match="half_best"):
        RewardConfig(baseline="half_best")
