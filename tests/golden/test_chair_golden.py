"""CHAIR equals the reference implementations on captions made to catch differences."""

from __future__ import annotations

import json
import random

import pytest

from csr_vlm.evaluation.annotations import read_annotations, truth_of
from csr_vlm.evaluation.answers import read_captions
from csr_vlm.evaluation.chair import Reader, Row, evaluate, summarise
from csr_vlm.evaluation.objects import ObjectTable
from csr_vlm.evaluation.singular import singularize
from csr_vlm.evaluation.words import tokenize, word_rule
from tests.shared_data import shared

FOLDER = shared("chair")
TABLE = ObjectTable.read(FOLDER / "synonyms.txt")
CAPTIONS = read_captions(FOLDER / "captions.jsonl")


def golden(name: str):
    return json.loads((FOLDER / f"golden_{name}.json").read_text(encoding="utf-8"))


def judged(rule: str, captions=CAPTIONS) -> list[Row]:
    reader = Reader(word_rule(rule, TABLE.vocabulary), TABLE)
    images = {caption.image_id for caption in captions}
    return evaluate(captions, truth_of(read_annotations(FOLDER / "annotations"), images, reader), reader)


def as_reference(row: Row) -> dict[str, object]:
    verdict = row.verdict
    return {
        "id": row.caption.caption_id,
        "image_id": row.caption.image_id,
        "gt": sorted(row.truth),
        "merged_tokens": list(row.reading.tokens),
        "matched_words": list(row.reading.words),
        "node_words": list(row.reading.objects),
        "idxs": list(row.reading.places),
        "hallucinated": [list(pair) for pair in zip(verdict.hallucinated_words, verdict.hallucinated, strict=True)],
        "hallucination_idxs": list(verdict.hallucinated_places),
        "CHAIRs": int(bool(verdict.hallucinated)),
        "CHAIRi": pytest.approx(row.chair_i, abs=1e-12),
        "Recall": pytest.approx(row.recall, abs=1e-12),
    }


def test_singular_forms_are_the_librarys():
    assert {word: singularize(word) for word in golden("singularize")} == golden("singularize")


def test_tokens_are_those_of_the_full_sentence_model():
    expected = {row["id"]: row["tokens"] for row in golden("tokens")["rows"]}
    assert {caption.caption_id: tokenize(caption.text) for caption in CAPTIONS} == expected


@pytest.mark.parametrize("rule", ["pattern", "wordnet"])
def test_every_caption_is_read_as_the_reference_reads_it(rule):
    if word_rule(rule).source.get("wordnet") == "built in":
        pytest.skip(
            "nltk has no WordNet and tagger here: python -m nltk.downloader wordnet averaged_perceptron_tagger_eng"
        )
    expected = golden(rule)
    rows = judged(rule)
    assert [as_reference(row) for row in rows] == expected["sentences"]
    metrics = summarise(rows)
    assert metrics["chair_s"].value == pytest.approx(expected["overall"]["CHAIRs"], abs=1e-12)
    assert metrics["chair_i"].value == pytest.approx(expected["overall"]["CHAIRi"], abs=1e-12)
    assert metrics["chair_s"].n == len(expected["sentences"]) == 170


def test_the_order_of_captions_changes_no_caption_and_no_rate():
    shuffled = random.Random(0).sample(CAPTIONS, len(CAPTIONS))
    straight, mixed = judged("pattern"), judged("pattern", shuffled)
    assert {row.caption.caption_id: row.dump() for row in straight} == {
        row.caption.caption_id: row.dump() for row in mixed
    }
    assert {name: m.value for name, m in summarise(straight).items()} == pytest.approx(
        {name: m.value for name, m in summarise(mixed).items()}
    )


def test_the_built_in_wordnet_finds_the_same_truth_and_nearly_the_same_mentions():
    """Without the trained tagger: what it takes for an adjective or a verb cannot be known."""
    if word_rule("wordnet").source["wordnet"] != "built in":
        pytest.skip("nltk's own WordNet is installed here, and then it is used")
    expected = golden("wordnet")
    rows = judged("wordnet")
    assert [sorted(row.truth) for row in rows] == [sentence["gt"] for sentence in expected["sentences"]]
    same = [
        list(row.reading.words) == sentence["matched_words"]
        for row, sentence in zip(rows, expected["sentences"], strict=True)
    ]
    assert sum(same) >= 159
    metrics = summarise(rows)
    assert metrics["chair_s"].value == pytest.approx(expected["overall"]["CHAIRs"], abs=1e-12)
    assert metrics["chair_i"].value == pytest.approx(expected["overall"]["CHAIRi"], abs=0.006)
    assert metrics["chair_i"].value != summarise(judged("pattern"))["chair_i"].value
