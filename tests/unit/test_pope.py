"""Test POPE: the three parsers, hand-worked metrics, question and answer files, and built questions."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.pope import (
    PARSERS,
    SETTINGS,
    Question,
    QuestionFile,
    evaluate,
    match_answers,
    parse_lenient,
    parse_official,
    parse_strict,
    read_answers,
    read_questions,
    score,
)
from csr_vlm.evaluation.pope_build import Scenery, build_questions, question_about, rows


@pytest.mark.parametrize(
    ("answer", "official", "strict", "lenient"),
    [
        ("Yes.", True, True, True),
        ("No, there is not.", False, False, False),
        ("NO", True, False, False),
        ("No!", True, False, False),
        ("There isn't a dog.", True, None, False),
        ("There is not a dog.", False, None, False),
        ("I see. No dog.", True, None, False),
        ("Yes, there is no doubt.", False, True, True),
        ("", True, None, None),
        ("Maybe.", True, None, None),
        (" No", False, False, False),
        ("Yesterday", True, None, None),
        ("42", True, None, None),
        ("no\n", True, False, False),
        ("Kein Hund — 没有", True, None, None),
    ],
)
def test_three_parsers(answer, official, strict, lenient):
    assert (parse_official(answer), parse_strict(answer), parse_lenient(answer)) == (official, strict, lenient)


@given(st.text(max_size=40))
def test_the_official_parser_reads_anything_and_lenient_agrees_with_strict(answer):
    assert isinstance(parse_official(answer), bool)
    if parse_strict(answer) is not None:
        assert parse_lenient(answer) is parse_strict(answer)


def test_hand_worked_metrics():
    found = score([True, True, True, False, False, False], [True, True, False, True, False, None])
    assert [found[name] for name in ("n", "TP", "FP", "TN", "FN", "unread")] == [6, 2, 1, 1, 1, 1]
    assert found["accuracy"] == 3 / 6
    assert found["precision"] == found["recall"] == 2 / 3
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["yes_ratio"] == 3 / 6
    assert found["undefined"] == {}
    assert found["intervals"]["accuracy"][0] <= 0.5 <= found["intervals"]["accuracy"][1]


@pytest.mark.parametrize(
    ("labels", "answers", "undefined"),
    [
        ([True, False], [False, False], {"precision", "f1"}),
        ([False], [True], {"recall", "f1"}),
        ([True, False], [False, True], {"f1"}),
        ([], [], {"accuracy", "precision", "recall", "f1", "yes_ratio"}),
    ],
)
def test_a_zero_denominator_gives_none_and_a_reason(labels, answers, undefined):
    found = score(labels, answers)
    assert set(found["undefined"]) == undefined == {name for name in PARSED if found[name] is None}
    assert all(found["undefined"].values())


PARSED = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def question_file(setting: str, ids: list[str]) -> QuestionFile:
    return QuestionFile(setting, "", tuple(Question(key, "", "?", key != "2") for key in ids), "")


def test_settings_are_scored_separately_and_averaged():
    files = [(question_file(name, ["1", "2"]), {"1": "Yes", "2": last}) for name, last in
             [("random", "No"), ("popular", "Yes")]]  # fmt: skip
    found = evaluate(files)
    assert set(found) == set(PARSERS)
    assert found["official"]["settings"]["popular"]["accuracy"] == 0.5
    assert found["official"]["mean"]["accuracy"] == 0.75
    files[0] = (files[0][0], {"1": "No", "2": "No"})
    assert evaluate(files)["official"]["mean"]["f1"] is None


def test_answers_are_matched_with_their_questions(tmp_path):
    a, b = question_file("random", ["1", "2"]), question_file("popular", ["3"])
    both, first, last = (tmp_path / name for name in ("both.jsonl", "a.jsonl", "b.jsonl"))
    both.write_text("".join(json.dumps({"question_id": key, "answer": str(key)}) + "\n" for key in (3, 1, 2)))
    first.write_text('[{"question_id": 1, "text": "1"}, {"question_id": "2", "text": "2"}]')
    last.write_text('{"question_id": 3, "answer": "3"}')
    expected = [(a, {"1": "1", "2": "2"}), (b, {"3": "3"})]
    assert match_answers([a, b], [both]) == match_answers([a, b], [first, last]) == expected
    with pytest.raises(CsrError, match="share question ids"):
        match_answers([a, a], [first])
    with pytest.raises(CsrError, match="1 questions without an answer, 2 answers to other"):
        match_answers([b], [first])
    with pytest.raises(CsrError, match="3 question files but 2 answer files"):
        match_answers([a, b, b], [first, last])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not in JSON Lines format"),
        ("1", "is not a JSON object"),
        ("", "contains no questions"),
        ('{"question_id": 1, "text": "?", "label": "maybe"}', "label is missing, or neither yes nor no"),
        ('{"question_id": 1, "label": "yes"}', "text is missing"),
        ('{"question_id": 1, "text": "?", "label": "yes"}\n' * 2, "occurs twice"),
    ],
)
def test_bad_questions_are_refused(tmp_path, text, complaint):
    path = tmp_path / "q.json"
    path.write_text(text)
    with pytest.raises(CsrError, match=complaint):
        read_questions(path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"question_id": 1}', "question_id or answer is missing"),
        ('{"answer": "a"}', "question_id or answer is missing"),
        ('{"question_id": 1, "answer": "a"}\n' * 2, "answered twice"),
    ],
)
def test_bad_answers_are_refused(tmp_path, text, complaint):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(CsrError, match=complaint):
        read_answers(path)


SCENERY = Scenery(
    {
        "1.png": frozenset({"dog", "ball"}),
        "2.png": frozenset({"dog", "ball", "cat"}),
        "3.png": frozenset({"cat", "owl"}),
        "4.png": frozenset({"dog"}),
    },
    ("dog", "ball", "cat", "owl", "ant"),
)


def test_frequent_and_co_occurring_objects_by_hand():
    assert SCENERY.popular() == ["dog", "ball", "cat", "owl", "ant"]
    assert SCENERY.co_occurring()["cat"][:3] == ["ball", "dog", "owl"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_built_questions_are_correct_balanced_and_deterministic(setting):
    found = build_questions(SCENERY, setting, num_images=3, per_image=2, seed=5)
    assert len(found) == 12
    for question in found:
        assert any(question.label == (name in SCENERY.images[question.image]) for name in SCENERY.names
                   if question.text == question_about(name))  # fmt: skip
    assert [question.label for question in found] == [True, False] * 6
    assert len({(question.image, question.text) for question in found}) == 12
    assert found == build_questions(SCENERY, setting, num_images=3, per_image=2, seed=5)
    assert found != build_questions(SCENERY, setting, num_images=3, per_image=2, seed=6)


def test_settings_differ_only_in_the_absent_objects():
    built = {name: build_questions(SCENERY, name, num_images=3, per_image=2) for name in SETTINGS}
    present = {name: [q for q in questions if q.label] for name, questions in built.items()}
    assert present["random"] == present["popular"] == present["adversarial"]
    absent = [q.text for q in built["popular"] if not q.label and q.image == "3.png"]
    assert absent == [question_about("dog"), question_about("ball")]


def test_questions_are_read_back_as_written(tmp_path):
    built = build_questions(SCENERY, "popular", num_images=2, per_image=2)
    path = tmp_path / "pope_popular.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(built)))
    found = read_questions(path)
    assert (found.setting, list(found.questions)) == ("popular", built)
    assert question_about("owl") == "Is there an owl in the image?"


def test_too_few_images_are_refused():
    with pytest.raises(CsrError, match="only 3 images"):
        build_questions(SCENERY, "random", num_images=4, per_image=2)
    with pytest.raises(CsrError, match="'hard' is not a valid setting"):
        build_questions(SCENERY, "hard", num_images=1)
