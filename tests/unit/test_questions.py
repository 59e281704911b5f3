"""Test the questions about a tree's claims and their answers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from csr_vlm.config.schema import QuestionsConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Node, NodeStatus, Pair, Response, negatives_column
from csr_vlm.method.questions import Claims, choose_questions, drop_if_sure, find_claims, negative_questions
from tests.unit.builders import config, node, prompt

SETTINGS = QuestionsConfig(pattern=r"an? (\w+)\.", per_prompt=6)


def scored(node_id: str, text: str, contrast: float) -> Node:
    return replace(node(node_id, text), cosines={"clip": contrast, negatives_column("clip"): 0.0})


def asked(kind: str) -> str:
    return f"Is there {'an' if kind[0] in 'aeiou' else 'a'} {kind} in the image?"


TREE = [
    scored("0", "There is a boat.", 0.40),
    scored("1", "There is a fish.", 0.09),
    scored("2", "There is an owl.", 0.15),  # between a quarter and half of 0.40
    scored("3", "We see a fish.", 0.05),
    scored("4", "There is a car.", 0.30),
]


def test_a_claim_has_the_highest_contrast_and_all_its_wordings() -> None:
    actual = find_claims(TREE, SETTINGS, "clip")
    assert actual.strongest == {asked("boat"): 0.40, asked("fish"): 0.09, asked("owl"): 0.15, asked("car"): 0.30}
    assert actual.sentences[asked("fish")] == ["There is a fish.", "We see a fish."]
    assert actual.best == 0.40


def test_no_and_yes_alternate_and_uncertain_claims_are_not_asked_about() -> None:
    actual = choose_questions(find_claims(TREE, SETTINGS, "clip"), {}, SETTINGS)
    assert actual == [(asked("fish"), False), (asked("boat"), True), (asked("car"), True)]


def test_claims_of_other_trees_are_denied_if_contradicted_and_never_affirmed() -> None:
    negatives = {asked("tree"): 0.02, asked("bus"): 0.39, asked("cat"): 0.01}
    actual = choose_questions(find_claims(TREE, SETTINGS, "clip"), negatives, SETTINGS)
    # The two kinds of no take turns among themselves.
    assert actual == [
        (asked("fish"), False),
        (asked("boat"), True),
        (asked("tree"), False),
        (asked("car"), True),
        (asked("cat"), False),
    ]
    assert (
        choose_questions(find_claims(TREE, SETTINGS, "clip"), negatives, SETTINGS.model_copy(update={"per_prompt": 2}))
        == actual[:2]
    )


def test_filtered_nodes_make_no_claims() -> None:
    out = [replace(n, status=NodeStatus.FILTERED) for n in TREE]
    assert find_claims(out, SETTINGS, "clip") == Claims({}, {}, 0.0)
    assert find_claims([], SETTINGS, "clip") == Claims({}, {}, 0.0)


def test_negative_questions_depend_only_on_their_words_and_the_key() -> None:
    claims = find_claims(TREE, SETTINGS, "clip")
    pool = [asked(kind) for kind in ("boat", "tree", "cat", "bus", "bird", "house")]
    chosen = negative_questions(claims, pool, 3, "0:p")
    assert len(set(chosen)) == 3
    assert asked("boat") not in chosen
    assert chosen == negative_questions(claims, pool[::-1], 3, "0:p")
    assert len({tuple(negative_questions(claims, pool, 3, f"0:{name}")) for name in range(20)}) > 5


def answered(*nats: float) -> list[Pair]:
    """Create pairs whose correct answer has a higher log-probability by the given nats."""

    def response(logprob: float) -> Response:
        return Response("0", (1,), logprob, "Yes.", 1, 0.0, complete=True)

    return [Pair(prompt(f"p?{at}"), 1, response(-1.0), response(-1.0 - gap)) for at, gap in enumerate(nats)]


def test_questions_the_policy_is_sure_of_are_kept_for_a_fraction_of_the_images() -> None:
    never = SETTINGS.model_copy(update={"sure": 3.0, "rehearsed": 0.0})
    assert drop_if_sure(answered(3.0, 9.0), never, "key") == []
    # One unsure answer keeps the sure ones beside it.
    unsure = answered(9.0, 2.9)
    assert drop_if_sure(unsure, never, "key") == unsure
    quarter = never.model_copy(update={"rehearsed": 0.25})
    kept = [bool(drop_if_sure(answered(9.0), quarter, f"0:1:p{number}")) for number in range(400)]
    assert 70 < sum(kept) < 130
    assert kept == [bool(drop_if_sure(answered(9.0), quarter, f"0:1:p{number}")) for number in range(400)]
    always = never.model_copy(update={"rehearsed": 1.0})
    assert drop_if_sure(answered(9.0), always, "key") == answered(9.0)


def test_a_ledger_without_negative_images_is_rejected() -> None:
    with pytest.raises(CsrError, match="no score by 'clip:others'"):
        find_claims([node("0")], SETTINGS, "clip")


@pytest.mark.parametrize(
    ("sentence", "nouns"),
    [
        ("There is a red boat.", ["boat"]),
        ("There is an orange owl and a blue fish.", ["owl", "fish"]),
        ("A parked car, a dog on a beach with an umbrella.", ["car", "dog", "beach", "umbrella"]),
        ("The man is riding a horse drawn carriage.", ["man", "horse", "carriage"]),
        ("It has a lot of charm, in a way.", []),
    ],
)
def test_the_default_preset_finds_nouns(sentence: str, nouns: list[str]) -> None:
    claims = find_claims([scored("0", sentence, 0.4)], config().method.pairs.questions, "clip")
    assert list(claims.sentences) == [asked(noun) for noun in nouns]


def test_a_question_must_match_its_pattern() -> None:
    with pytest.raises(ValueError, match="do not match"):
        QuestionsConfig(pattern=r"an? (\w+)", question="Is there {a} {1}?")


def test_a_configuration_with_questions_requires_negative_images() -> None:
    cosine = {"reward": {"image_score": "cosine", "baseline": "none"}}
    scorer = {"path": "scorer", "others": 0}
    with pytest.raises(CsrError, match=r"scorer.others=0, but method.pairs.questions requires"):
        config(scorer=scorer, method=cosine)
    config(scorer=scorer, method=cosine | {"pairs": {"questions": {"pattern": ""}}})


def test_the_lexicon_asks_about_things_only_and_takes_plurals_and_synonyms_for_one_claim() -> None:
    settings = QuestionsConfig(pattern="lexicon")
    trees = [
        scored("0", "Two umbrellas stand on a bench.", 0.4),
        scored("1", "There is an umbrella in a moment of calm.", 0.1),
        scored("2", "In a way, it is a sitting area.", 0.3),
    ]
    actual = find_claims(trees, settings, "clip")
    assert actual.strongest == {asked("umbrella"): 0.4, asked("bench"): 0.4}
    assert actual.sentences[asked("umbrella")] == [
        "Two umbrellas stand on a bench.",
        "There is an umbrella in a moment of calm.",
    ]


def test_a_claim_in_the_plural_is_not_denied_in_the_singular() -> None:
    claims = find_claims([scored("0", "Two umbrellas stand here.", 0.4)], QuestionsConfig(pattern="lexicon"), "clip")
    assert negative_questions(claims, [asked("umbrella"), asked("dog")], 2, "key") == [asked("dog")]


def test_another_language_has_its_own_lexicon_and_question() -> None:
    settings = QuestionsConfig(pattern="lexicon", question="图中有{0}吗？", yes="有。", no="没有。")
    claims = find_claims([scored("0", "一只小狗在草地上。", 0.4)], settings, "clip", "zh")
    assert next(iter(claims.strongest)) == "图中有狗吗？"
