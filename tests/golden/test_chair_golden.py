"""CHAIR equals the reference implementations on captions designed to expose differences."""

from __future__ import annotations

import json
import random

import pytest

from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.annotations import ground_truth, read_annotations
from csr_vlm.evaluation.answers import read_captions
from csr_vlm.evaluation.chair import CaptionScore, ObjectReader, evaluate, summarize
from csr_vlm.evaluation.objects import ObjectTable
from csr_vlm.evaluation.singular import singularize
from csr_vlm.evaluation.words import tokenize, word_rule
from tests.shared_data import shared

FOLDER = shared("chair")
TABLE = ObjectTable.read(FOLDER / "synonyms.txt")
CAPTIONS = read_captions(FOLDER / "captions.jsonl")


def golden(name: str):
    return json.loads((FOLDER / f"golden_{name}.json").read_text(encoding="utf-8"))


def scores_under(rule: str, captions=CAPTIONS) -> list[CaptionScore]:
    reader = ObjectReader(word_rule(rule), TABLE)
    images = {caption.image_id for caption in captions}
    return evaluate(captions, ground_truth(read_annotations(FOLDER / "annotations"), images, reader), reader)


def as_reference(score: CaptionScore) -> dict[str, object]:
    checked = score.checked
    return {
        "id": score.caption.caption_id,
        "image_id": score.caption.image_id,
        "gt": sorted(score.truth),
        "merged_tokens": list(score.mentions.tokens),
        "matched_words": list(score.mentions.words),
        "node_words": list(score.mentions.objects),
        "idxs": list(score.mentions.positions),
        "hallucinated": [list(pair) for pair in zip(checked.hallucinated_words, checked.hallucinated, strict=True)],
        "hallucination_idxs": list(checked.hallucinated_positions),
        "CHAIRs": int(bool(checked.hallucinated)),
        "CHAIRi": pytest.approx(score.chair_i, abs=1e-12),
        "Recall": pytest.approx(score.recall, abs=1e-12),
    }


def test_singular_forms_equal_the_librarys():
    assert {word: singularize(word) for word in golden("singularize")} == golden("singularize")


def test_tokens_equal_those_of_the_full_sentence_model():
    expected = {row["id"]: row["tokens"] for row in golden("tokens")["rows"]}
    assert {caption.caption_id: tokenize(caption.text) for caption in CAPTIONS} == expected


@pytest.mark.parametrize("rule", ["pattern", "wordnet"])
def test_every_field_of_every_caption_equals_the_reference(rule):
    try:
        scores = scores_under(rule)
    except CsrError as error:
        pytest.skip(f"{error.message}; {error.hint}")
    expected = golden(rule)
    assert [as_reference(score) for score in scores] == expected["sentences"]
    metrics = summarize(scores)
    assert metrics["chair_s"].value == pytest.approx(expected["overall"]["CHAIRs"], abs=1e-12)
    assert metrics["chair_i"].value == pytest.approx(expected["overall"]["CHAIRi"], abs=1e-12)
    assert metrics["chair_s"].n == len(expected["sentences"]) == 170


def test_scores_and_rates_do_not_depend_on_the_order_of_captions():
    shuffled = random.Random(0).sample(CAPTIONS, len(CAPTIONS))
    in_order, mixed = scores_under("pattern"), scores_under("pattern", shuffled)
    assert {score.caption.caption_id: score.dump() for score in in_order} == {
        score.caption.caption_id: score.dump() for score in mixed
    }
    assert {name: m.value for name, m in summarize(in_order).items()} == pytest.approx(
        {name: m.value for name, m in summarize(mixed).items()}
    )
