"""Test the claims of sentences: hand-worked cases, lexicon files, and the measure on labeled sentences."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import pytest

from csr_vlm.core.errors import CsrError
from csr_vlm.method import claims, english, lexicon
from csr_vlm.method.claims import claim_finder
from csr_vlm.method.lexicon import Lexicon

LABELED = Path(__file__).parents[1] / "data" / "claims.jsonl"
ROWS = [json.loads(line) for line in LABELED.read_text(encoding="utf-8").splitlines()]


def names(sentence: str, lexicon: str = "en") -> list[str]:
    return [claim.name for claim in claim_finder(lexicon).find(sentence)]


def precision_and_recall(language: str, split: str) -> tuple[float, float]:
    """Compare claims and labels; a label that is a synonym counts as its thing."""
    things = Lexicon.load(language).names
    right = found = labeled = 0
    for row in ROWS:
        if (row["language"], row["split"]) == (language, split):
            actual, expected = set(names(row["sentence"], language)), {things.get(c, c) for c in row["claims"]}
            right += len(actual & expected)
            found += len(actual)
            labeled += len(expected)
    return right / found, right / labeled


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("split", ["development", "held-out"])
def test_precision_and_recall_on_labeled_sentences(language, split):
    precision, recall = precision_and_recall(language, split)
    assert precision >= 0.97
    assert recall >= 0.9


def test_there_are_enough_sentences_and_things():
    english_rows = [row for row in ROWS if row["language"] == "en"]
    assert len(english_rows) >= 300
    assert len(ROWS) - len(english_rows) >= 40
    assert {row["style"] for row in english_rows} == {"llava", "qwen", "reasoning"}
    assert len(set(Lexicon.load("en").names.values())) >= 1500
    assert not {row["sentence"] for row in ROWS if row["split"] == "held-out"} & {
        row["sentence"] for row in ROWS if row["split"] == "development"
    }


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("A man rides a bicycle past two dogs and a fountain.", ["man", "bicycle", "dog", "fountain"]),
        ("Umbrellas lie on the sofa.", ["umbrella", "couch"]),
        ("There is fruit next to bread and cheese.", ["fruit", "bread", "cheese"]),
        ("A dog sits beside another dog.", ["dog"]),
        ("A pizza box lies on the table.", ["box", "table"]),
        ("The woman's hat is red.", ["woman", "hat"]),
        ("This is a special moment, taken in a playful way as a result.", []),
        ("Smiling and standing, waiting and looking.", []),
        ("There is no dog on the couch.", ["couch"]),
        ("It is not a dog, a cat, or a bird.", []),
        ("There is no dog, just a cat.", ["cat"]),
        ("There is no dog, but a cat.", ["cat"]),
        ("Is there a dog?", []),
        ("If there were a dog, it would bark.", []),
        ("It might be a dog or a cat.", []),
        ("The water looks like a mirror.", ["water"]),
        ("There are items like a cup and a plate.", ["cup", "plate"]),
        ('The sign says "dog".', ["sign"]),
        ("A statue of a horse stands there.", ["statue"]),
        ("He watches the train leave.", ["train"]),
        ("He wears a watch.", ["watch"]),
        ("A boat sails in the distance.", ["boat"]),
        ("Two glasses of wine and a man with glasses.", ["glass", "wine", "man", "glasses"]),
        ("The lights are on in soft light.", ["light"]),
        ("", []),
        ("...", []),
    ],
)
def test_claims_of_a_sentence(sentence, expected):
    assert names(sentence) == expected


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Two red umbrellas lie there.", ("two", "red")),
        ("A large umbrella lies there.", ("one", "")),
        ("3 umbrellas lie there.", ("3", "")),
        ("The umbrella is bright green.", ("", "")),
        ("The umbrella is green.", ("", "green")),
        ("The umbrella lies there.", ("", "")),
        ("Several blue and white umbrellas lie there.", ("", "white")),
    ],
)
def test_count_and_color(sentence, expected):
    [claim] = claim_finder().find(sentence)
    assert (claim.name, claim.count, claim.color) == ("umbrella", *expected)


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("一只小狗和两只猫在沙滩上。", ["狗", "猫", "海滩"]),
        ("没有狗，但有一只猫。", ["猫"]),
        ("可能有一只狗。", []),
        ("如果有狗，猫会跑。", []),
        ("有狗吗？", []),
        ("画面中有手机。", ["手机"]),
    ],
)
def test_chinese_claims(sentence, expected):
    assert names(sentence, "zh") == expected


def test_a_lexicon_file_replaces_the_shipped_one(tmp_path):
    path = tmp_path / "medical.txt"
    path.write_text("# chest images\nlung nodule, nodule\neffusion\n", encoding="utf-8")
    assert names("Two nodules and an effusion lie beside a dog.", str(path)) == ["lung nodule", "effusion"]


def test_a_language_with_spaces_needs_only_its_wordings(tmp_path):
    path = tmp_path / "de.txt"
    path.write_text("! match: words\n! negation: kein, keine\nHund, Hunde\nKatze, Katzen\n", encoding="utf-8")
    assert names("Zwei Hunde, aber keine Katze. Ein Hundehaus.", str(path)) == ["hund"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "lists nothing"),
        ("# nothing\n", "lists nothing"),
        ("! match: letters\ndog\n", "'letters' is not a valid match"),
        ("dog\n! plurals: dogs\n", "line 2: 'plurals' is not a valid setting"),
    ],
)
def test_an_invalid_lexicon_is_refused(tmp_path, content, message):
    path = tmp_path / "lexicon.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(CsrError, match=message):
        claim_finder(str(path))


def test_a_missing_lexicon_is_refused(tmp_path):
    with pytest.raises(CsrError, match="cannot be read") as error:
        claim_finder(str(tmp_path / "none.txt"))
    assert "en, zh" in str(error.value.hint)


@pytest.mark.parametrize("module", [claims, english, lexicon])
def test_the_documented_examples(module):
    assert doctest.testmod(module).failed == 0
