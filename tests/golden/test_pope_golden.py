"""POPE equals the official script on its reference cases."""

from __future__ import annotations

import json

import pytest

from csr_vlm.evaluation.pope import parse_official, read_questions, score
from tests.shared_data import shared

FOLDER = shared("pope")
CASES = json.loads((FOLDER / "golden_pope.json").read_text(encoding="utf-8"))["cases"]


def labels_of(case) -> list[bool]:
    if "questions_file" in case:
        return [question.label for question in read_questions(FOLDER / case["questions_file"]).questions]
    return [label == "yes" for label in case["labels"]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_parsed_answers_and_metrics_equal_the_official_ones(case):
    expected = case["expected"]
    parsed = [parse_official(answer) for answer in case["answers"]]
    if "parsed" in expected:
        assert ["yes" if yes else "no" for yes in parsed] == expected["parsed"]
    metrics = score(labels_of(case), parsed)
    for name in ("TP", "FP", "TN", "FN"):
        assert metrics[name] == expected[name]
    for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        if name in expected:
            assert metrics[name] == pytest.approx(expected[name], abs=1e-12)
    assert bool(metrics["undefined"]) == (expected["error"] == "ZeroDivisionError")


@pytest.mark.parametrize("setting", ["random", "popular", "adversarial"])
def test_published_question_files_are_recognized(setting):
    found = read_questions(FOLDER / f"coco_pope_{setting}.json")
    assert found.setting == setting
    assert found.name == f"POPE on COCO val2014, {setting}, 3,000 questions"
    assert len(found.questions) == 3000
    assert sum(question.label for question in found.questions) == 1500


def test_an_altered_question_file_is_not_recognized_as_published(tmp_path):
    lines = (FOLDER / "coco_pope_random.json").read_text(encoding="utf-8").splitlines()
    (tmp_path / "coco_pope_random.json").write_text("\n".join(lines[1:]), encoding="utf-8")
    assert "none of POPE's current files" in read_questions(tmp_path / "coco_pope_random.json").name
    (tmp_path / "coco_pope_random.json").write_text("\n".join(lines[:2910]), encoding="utf-8")
    assert "older file" in read_questions(tmp_path / "coco_pope_random.json").name
