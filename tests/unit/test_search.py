"""Test the search on a hand-worked tree, and properties that hold for every tree."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csr_vlm.config.schema import FilterConfig, MethodConfig
from csr_vlm.core.records import Candidate, Expansion, Finish, NodeStatus, Prompt
from csr_vlm.method.search import Tree, is_filtered, search
from tests.unit.builders import config, method, prompt

STOP = Candidate((0,), (-0.5,), "", Finish.EOS)
"""Ends a response and adds no sentence."""


def say(text: str, *logprobs: float, finish: Finish = Finish.DELIMITER) -> Candidate:
    logprobs = logprobs or (-1.0, -1.0)
    return Candidate(tuple(hash_ids(text, len(logprobs))), logprobs, text, finish)


def hash_ids(text: str, length: int) -> list[int]:
    return [sum(map(ord, text)) * 10 + place for place in range(length)]


@dataclass
class Script:
    """Propose scripted candidates, and the end of the response where there are none."""

    lines: dict[str, list[Candidate]]
    asked: list[list[Expansion]] = field(default_factory=list)

    def __call__(self, requests: Sequence[Expansion]) -> list[list[Candidate]]:
        self.asked.append(list(requests))
        return [self.lines.get(request.node_id, [STOP]) for request in requests]


@dataclass
class Scores:
    """Look up cosines and record the requests."""

    cosines: dict[str, float]
    asked: list[list[tuple[str, str]]] = field(default_factory=list)

    def __call__(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        self.asked.append([(asked.prompt_id, sentence) for asked, sentence in items])
        return [{"clip": self.cosines[sentence]} for _, sentence in items]


def grow(lines: dict[str, list[Candidate]], cosines: dict[str, float], method_config: MethodConfig) -> Tree:
    (tree,) = search([prompt()], Script(lines), Scores(cosines), method_config, iteration=1, seed=0, scorer="clip")
    return tree


def statuses(tree: Tree) -> dict[str, NodeStatus]:
    return {node.node_id: node.status for node in tree.nodes}


# Two rounds. With lambda 1 a sentence's reward is 100 times its cosine.
LINES = {
    "": [
        say("Aaaa.", -1.0, -1.0),
        say("Bbbb.", -1.5, -1.5),
        say("Cccc.", -2.0, -2.0),
        say("Aaaa.", -1.0, -1.0),
        say("Dd."),
        say("Eeee.", finish=Finish.EOS),
        say("Ffff", finish=Finish.LENGTH),
    ],
    "0": [STOP, say(" Gggg.", -4.0, -4.0), say(" Hhhh.", -0.1, -0.1)],
    "2": [say(" Iiii.", -0.5, -0.5), say(" Jjjj.", -1.0, -1.0)],
}
COSINES = {
    "Aaaa.": 0.30,
    "Bbbb.": 0.20,
    "Cccc.": 0.10,
    "Dd.": 0.99,
    "Eeee.": 0.05,
    "Ffff": 0.98,
    "Gggg.": 0.25,
    "Hhhh.": 0.15,
    "Iiii.": 0.05,
    "Jjjj.": 0.40,
}
FIRST_ROUND = {
    "0": NodeStatus.TOP,  # 30, the best that can go on
    "1": NodeStatus.PRUNED,  # 20
    "2": NodeStatus.BOTTOM,  # 10, the worst that can go on
    "3": NodeStatus.DUPLICATE,
    "4": NodeStatus.FILTERED,  # three characters
    "5": NodeStatus.FINISHED,  # kept although its 5 is the worst
    "6": NodeStatus.TRUNCATED,  # kept out of the beam although its 98 is the best
}


def steered(steer_by: str, max_sentences: int) -> MethodConfig:
    search_settings = {
        "num_candidates": 7,
        "keep_top": 1,
        "keep_bottom": 1,
        "steer_by": steer_by,
        "max_sentences": max_sentences,
        "filters": {"min_chars": 4},
    }
    return method(1.0, search=search_settings, reward={"response": "sum"})


def test_every_status_of_a_hand_worked_tree():
    tree = grow(LINES, COSINES, steered("sentence", max_sentences=2))
    assert statuses(tree) == FIRST_ROUND | {
        "0.0": NodeStatus.FINISHED,  # only ends "Aaaa."
        "0.1": NodeStatus.PRUNED,  # 25
        "0.2": NodeStatus.PRUNED,  # 15
        "2.0": NodeStatus.TRUNCATED,  # 5, the worst, at the sentence limit
        "2.1": NodeStatus.TRUNCATED,  # 40, the best, at the sentence limit
    }
    assert tree.frontier == []


@pytest.mark.parametrize(
    ("steer_by", "best", "worst"),
    [
        ("sentence", "2.1", "2.0"),  # 25, 15, 5, 40
        ("response", "0.1", "2.0"),  # 30+25, 30+15, 10+5, 10+40
        ("logprob", "0.2", "0.1"),  # -10/4, -2.2/4, -5/4, -6/4
        ("sentence_logprobs", "0.2", "0.1"),  # -1-4, -1-0.1, -2-0.5, -2-1
    ],
)
def test_steering(steer_by, best, worst):
    actual = statuses(grow(LINES, COSINES, steered(steer_by, max_sentences=3)))
    assert {key: actual[key] for key in FIRST_ROUND} == FIRST_ROUND
    second = {key: status for key, status in actual.items() if key in {"0.1", "0.2", "2.0", "2.1"}}
    assert second == dict.fromkeys(second, NodeStatus.PRUNED) | {best: NodeStatus.TOP, worst: NodeStatus.BOTTOM}


def test_steering_by_logprob_counts_tokens():
    # -1 for one token against -2 for four: the longer sentence is the likelier a token.
    lines = {"": [say("Aaaa.", -1.0), say("Bbbb.", -0.5, -0.5, -0.5, -0.5)]}
    actual = statuses(grow(lines, COSINES, steered("logprob", max_sentences=2)))
    assert (actual["0"], actual["1"]) == (NodeStatus.BOTTOM, NodeStatus.TOP)


def test_steering_by_sentences_sums_their_means():
    # After "Aaaa." at -1: one token at -3 makes -4; four at -1 each make -2. Per token of the response, -2 and -1.
    lines = {"": [say("Aaaa.", -1.0)], "0": [say(" Bbbb.", -3.0), say(" Cccc.", -1.0, -1.0, -1.0, -1.0)]}
    lines |= {"0.0": [say(" Gggg.", -0.2)], "0.1": [say(" Hhhh.", -2.5)]}
    one = {"keep_top": 1, "keep_bottom": 1, "max_sentences": 3}
    # -1-3-0.2 = -4.2 against -1-1-2.5 = -4.5; per token -4.2/3 = -1.4 against -7.5/6 = -1.25.
    summed = statuses(grow(lines, COSINES, method(search=one | {"keep_bottom": 0, "steer_by": "sentence_logprobs"})))
    assert summed["0.1"] is NodeStatus.TOP
    assert summed["0.0"] is NodeStatus.PRUNED
    both = statuses(grow(lines, COSINES, method(search=one | {"steer_by": "sentence_logprobs", "max_sentences": 4})))
    assert (both["0.0.0"], both["0.1.0"]) == (NodeStatus.TOP, NodeStatus.BOTTOM)
    both = statuses(grow(lines, COSINES, method(search=one | {"steer_by": "logprob", "max_sentences": 4})))
    assert (both["0.0.0"], both["0.1.0"]) == (NodeStatus.BOTTOM, NodeStatus.TOP)


def test_only_kept_nodes_are_expanded_from_their_own_tokens():
    script, method_config = Script(LINES), steered("sentence", max_sentences=3)
    (tree,) = search([prompt()], script, Scores(COSINES), method_config, iteration=4, seed=9, scorer="clip")
    assert [[request.node_id for request in asked] for asked in script.asked] == [[""], ["0", "2"], ["2.1", "2.0"]]
    first, second, third = script.asked
    assert first[0].prefix_ids == ()
    assert second[1].prefix_ids == say("Cccc.", -2.0, -2.0).token_ids
    assert third[0].prefix_ids == say("Cccc.", -2, -2).token_ids + say(" Jjjj.").token_ids
    assert first[0].seed == (9, "p", 4, "")
    assert third[1].seed == (9, "p", 4, "2.0")
    assert {request.num_candidates for asked in script.asked for request in asked} == {7}
    assert {node.iteration for node in tree.nodes} == {4}


def test_every_node_stores_its_measurements():
    tree = grow(LINES, COSINES, steered("sentence", max_sentences=2))
    by_id = {node.node_id: node for node in tree.nodes}
    assert by_id["2.1"].parent_id == "2"
    assert by_id["2.1"].depth == 2
    assert by_id["2.1"].text == " Jjjj."
    assert by_id["2.1"].cosines == {"clip": 0.40}
    assert by_id["4"].cosines == {"clip": 0.99}, "filtered sentences are scored too"
    assert by_id["0.0"].cosines == {}
    assert by_id["0.0"].token_logprobs == (-0.5,)


@pytest.mark.parametrize("finish", [Finish.EOS, Finish.DELIMITER, Finish.LENGTH])
def test_an_empty_first_sentence_is_filtered(finish):
    tree = grow({"": [Candidate((0,), (-0.1,), " ", finish)]}, {}, method())
    assert statuses(tree) == {"0": NodeStatus.FILTERED}
    assert tree.frontier == []


def test_an_empty_sentence_that_does_not_end_the_response_is_filtered():
    lines = {"": [say("Aaaa.")], "0": [Candidate((7,), (-0.1,), " ", Finish.LENGTH)]}
    assert statuses(grow(lines, COSINES, method())) == {"0": NodeStatus.TOP, "0.0": NodeStatus.FILTERED}


@pytest.mark.parametrize("max_sentences", [1, 2, 5])
def test_max_sentences(max_sentences):
    lines = {".".join("0" * depth): [say(" Aaaa.")] for depth in range(10)}
    tree = grow(lines, COSINES, method(search={"max_sentences": max_sentences}))
    assert [node.depth for node in tree.nodes] == list(range(1, max_sentences + 1))
    assert [node.status for node in tree.nodes] == [NodeStatus.TOP] * (max_sentences - 1) + [NodeStatus.TRUNCATED]


@pytest.mark.parametrize(
    ("limit", "status"), [(11, NodeStatus.TOP), (10, NodeStatus.TRUNCATED), (None, NodeStatus.TOP)]
)
def test_max_response_chars_counts_the_white_space(limit, status):
    lines = {"": [say("Aaaa.")], "0": [say(" Bbbb.")]}  # 5 + 6 characters
    actual = statuses(grow(lines, COSINES, method(search={"max_response_chars": limit})))
    assert actual["0"] is NodeStatus.TOP
    assert actual["0.0"] is status


def test_a_finished_response_may_be_longer_than_the_character_limit():
    lines = {"": [say("Aaaa.", finish=Finish.EOS)]}
    assert statuses(grow(lines, COSINES, method(search={"max_response_chars": 2}))) == {"0": NodeStatus.FINISHED}


def test_no_candidate_is_both_top_and_bottom():
    # Two candidates, three places: the second is not both among the best and the worst.
    lines = {"": [say("Aaaa."), say("Bbbb.")]}
    actual = statuses(grow(lines, COSINES, method(search={"keep_top": 1, "keep_bottom": 2})))
    assert actual == {
        "0": NodeStatus.TOP,
        "1": NodeStatus.BOTTOM,
        "0.0": NodeStatus.FINISHED,
        "1.0": NodeStatus.FINISHED,
    }


def test_ties_go_to_the_earlier_node():
    cosines = dict.fromkeys(COSINES, 0.2)
    lines = {"": [say("Aaaa."), say("Bbbb."), say("Cccc.")]}
    actual = statuses(grow(lines, cosines, method(1.0, search={"keep_top": 1, "keep_bottom": 1})))
    assert (actual["0"], actual["1"], actual["2"]) == (NodeStatus.TOP, NodeStatus.BOTTOM, NodeStatus.PRUNED)


def test_official_filters():
    filters = config(preset="official").method.search.filters
    assert is_filtered("Abc", filters)
    assert not is_filtered("Abcd", filters)
    assert is_filtered("a\nb\nc\nd\ne\nf\ng", filters)
    assert not is_filtered("a\nb\nc\nd\ne\nfg", filters)
    assert is_filtered("A very very very very very very big boat.", filters), "six times"
    assert not is_filtered("A very very very very very big boat.", filters), "five times"
    assert is_filtered("Ah, it is a looooooooooong boat.".replace("oooooooooo", "o" * 11), filters)
    assert not is_filtered("A l" + "o" * 10 + "ng boat.", filters)
    assert is_filtered("A boat - - - - - - - - - - - there.", filters), "spaces between do not count"
    for foreign in ("Это лодка.", "ここに船。", "배가 있다.", "A boat \U0001f600.", "A&nbsp;&nbsp;boat."):
        assert is_filtered(foreign, filters), foreign
    for accepted in ("Ein Café, señor Łukasz!", "3 × 4 = 12 — “naïve” …", "有一条船。", "A boat λ.", "A&nbsp;boat."):
        assert not is_filtered(accepted, filters), accepted


def test_default_filters_accept_what_the_official_filters_reject():
    for text in ("Abc", "a\nb\nc\nd\ne\nf\ng", "Это лодка.", "no " * 6):
        assert not is_filtered(text, FilterConfig())


def test_a_sentence_that_is_cut_off_ends_the_response_or_goes_on():
    lines = {"": [say("Ffff", finish=Finish.LENGTH)], "0": [say(" Aaaa.")]}
    assert statuses(grow(lines, COSINES, method())) == {"0": NodeStatus.TRUNCATED}
    actual = statuses(grow(lines, COSINES, method(search={"continue_cut": True})))
    assert actual == {"0": NodeStatus.TOP, "0.0": NodeStatus.TOP, "0.0.0": NodeStatus.FINISHED}


def test_few_partial_responses_are_all_kept():
    # Three can go on: with places for two, one is pruned, unless fewer than four are all kept.
    lines = {"": [say("Aaaa."), say("Bbbb."), say("Cccc.")]}
    one_each = {"keep_top": 1, "keep_bottom": 1}
    actual = statuses(grow(lines, COSINES, method(1.0, search=one_each | {"keep_all_below": 3})))
    assert [actual[key] for key in "012"] == [NodeStatus.TOP, NodeStatus.PRUNED, NodeStatus.BOTTOM]
    actual = statuses(grow(lines, COSINES, method(1.0, search=one_each | {"keep_all_below": 4})))
    assert [actual[key] for key in "012"] == [NodeStatus.TOP] * 3


WORDS = ("Boat.", "Fish.", "Tree.", "A bird sings.", "Лодка.", "ok")


@dataclass
class RandomModel:
    """Propose and score at random, as a function of the request alone."""

    salt: int
    asked: list[list[Expansion]] = field(default_factory=list)
    scored: list[list[tuple[str, str]]] = field(default_factory=list)

    def propose(self, requests: Sequence[Expansion]) -> list[list[Candidate]]:
        self.asked.append(list(requests))
        return [[self._candidate(request, i) for i in range(request.num_candidates)] for request in requests]

    def _candidate(self, request: Expansion, index: int) -> Candidate:
        rng = random.Random(f"{self.salt} {request.seed} {index}")
        word = rng.choice(["", *WORDS])
        finish = rng.choices([Finish.DELIMITER, Finish.EOS, Finish.LENGTH], [6, 2, 1])[0]
        ids = (len(word), WORDS.index(word) if word else 99)
        return Candidate(ids, (-rng.random(), -rng.random()), f" {word}", finish)

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        self.scored.append([(asked.prompt_id, sentence) for asked, sentence in items])
        return [{"clip": random.Random(f"{self.salt} {p.prompt_id} {s}").uniform(-0.2, 0.5)} for p, s in items]


methods = st.builds(
    lambda weight, fusion, response, repeat_penalty, **settings: method(
        weight,
        search=settings | {"filters": {"min_chars": 3, "other_scripts": True, "loops": True}},
        reward={"fusion": fusion, "response": response, "repeat_penalty": repeat_penalty},
    ),
    weight=st.floats(0, 1),
    fusion=st.sampled_from(["weighted", "sibling_rank"]),
    response=st.sampled_from(["sum", "mean", "mean_plus_one"]),
    repeat_penalty=st.sampled_from([0.0, 1.0]),
    num_candidates=st.integers(1, 5),
    keep_top=st.integers(1, 3),
    keep_bottom=st.integers(0, 3),
    steer_by=st.sampled_from(["sentence", "response", "logprob", "sentence_logprobs"]),
    max_sentences=st.integers(1, 4),
    max_response_chars=st.none() | st.integers(5, 40),
)
EXPANDED = {NodeStatus.TOP, NodeStatus.BOTTOM}
PROMPTS = [prompt(name) for name in ("a", "b", "c")]


def run(model: RandomModel, prompts: Sequence[Prompt], method_config: MethodConfig) -> list[Tree]:
    return search(prompts, model.propose, model.score, method_config, iteration=1, seed=3, scorer="clip")


@given(st.integers(0, 10**6), methods)
def test_exactly_the_kept_nodes_have_children(salt, method_config):
    for tree in run(RandomModel(salt), PROMPTS, method_config):
        by_id = {node.node_id: node for node in tree.nodes}
        assert len(by_id) == len(tree.nodes)
        parents = {node.parent_id for node in tree.nodes} - {""}
        assert all(by_id[parent].status in EXPANDED for parent in parents)
        assert {node.node_id for node in tree.nodes if node.status in EXPANDED} == parents, "kept nodes are expanded"
        assert all(
            node.depth == node.node_id.count(".") + 1 <= method_config.search.max_sentences for node in tree.nodes
        )


@given(st.integers(0, 10**6), methods)
def test_at_most_top_k_and_bottom_k_nodes_are_kept_per_round(salt, method_config):
    for tree in run(RandomModel(salt), PROMPTS, method_config):
        for depth in range(1, method_config.search.max_sentences + 1):
            level = [node for node in tree.nodes if node.depth == depth]
            assert sum(node.status is NodeStatus.TOP for node in level) <= method_config.search.keep_top
            assert sum(node.status is NodeStatus.BOTTOM for node in level) <= method_config.search.keep_bottom


@given(st.integers(0, 10**6), methods, st.permutations(PROMPTS))
def test_a_tree_does_not_depend_on_the_other_prompts(salt, method_config, order):
    together = {tree.prompt.prompt_id: tree.nodes for tree in run(RandomModel(salt), order, method_config)}
    for one in PROMPTS:
        (alone,) = run(RandomModel(salt), [one], method_config)
        assert alone.nodes == together[one.prompt_id]


def test_different_prompts_and_seeds_give_different_trees():
    method_config = method()
    first, second, _ = run(RandomModel(1), PROMPTS, method_config)
    assert [node.text for node in first.nodes] != [node.text for node in second.nodes]
    other = search(
        PROMPTS, RandomModel(1).propose, RandomModel(1).score, method_config, iteration=1, seed=4, scorer="clip"
    )
    assert [node.text for node in first.nodes] != [node.text for node in other[0].nodes]


@given(st.integers(0, 10**6), methods)
def test_each_distinct_sentence_is_scored_once_per_round(salt, method_config):
    model = RandomModel(salt)
    trees = run(model, PROMPTS, method_config)
    assert len(model.scored) == len(model.asked) <= method_config.search.max_sentences
    for depth, scored in enumerate(model.scored, start=1):
        assert len(scored) == len(set(scored))
        said = {
            (node.prompt_id, node.sentence)
            for tree in trees
            for node in tree.nodes
            if node.depth == depth and node.sentence
        }
        assert set(scored) == said


@given(st.integers(0, 10**6), methods)
def test_prefixes_are_the_tokens_along_the_path(salt, method_config):
    model = RandomModel(salt)
    by_id = {(node.prompt_id, node.node_id): node for tree in run(model, PROMPTS, method_config) for node in tree.nodes}
    for request in (request for asked in model.asked for request in asked if request.node_id):
        parts = request.node_id.split(".")
        path = [by_id[request.prompt.prompt_id, ".".join(parts[: n + 1])] for n in range(len(parts))]
        assert request.prefix_ids == tuple(token for node in path for token in node.token_ids)
