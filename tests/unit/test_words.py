"""The word rules, on words whose forms can be looked up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.objects import ObjectTable
from csr_vlm.evaluation.singular import singularize
from csr_vlm.evaluation.words import builtin_lemma, builtin_tags, letters, tokenize, word_rule

NOUNS = frozenset({"bus", "glass", "wine", "knife", "dog", "tie", "person", "people", "child", "ski"})


@pytest.mark.parametrize(
    ("word", "singular"),
    [
        ("dogs", "dog"),
        ("knives", "knife"),
        ("wolves", "wolf"),
        ("babies", "baby"),
        ("mice", "mouse"),
        ("women", "woman"),
        ("bus", "bu"),
        ("buses", "bus"),
        ("ties", "ty"),
        ("collies", "collies"),
        ("ears", "ears"),
        ("four", "fmy"),
        ("taxi", "taxi"),
        ("safari", "safarus"),
        ("mothers-in-law", "mother-in-law"),
        ("hot-dogs", "hot-dog"),
        ("dogs'", "dog's"),
        ("bases", "basis"),
        ("analyses", "analysis"),
        ("reanalyses", "reanalyasis"),
        ("", ""),
    ],
)
def test_singular_forms_with_the_librarys_mistakes(word, singular):
    assert singularize(word) == singular


@given(st.text(max_size=30))
def test_any_token_has_a_singular_and_any_text_words(text):
    assert isinstance(singularize(text.lower()), str)
    for name in ("pattern", "wordnet", "plain"):
        assert all(isinstance(word, str) for word in word_rule(name, NOUNS).read(text))


def test_tokens_end_sentences_but_not_abbreviations():
    assert tokenize("Dr. Smith's dog can't wait. It's 3 p.m. now.") == [
        "dr.", "smith", "'s", "dog", "ca", "n't", "wait", ".", "it", "'s", "3", "p.m.", "now", ".",
    ]  # fmt: skip


def test_plain_words_are_runs_of_letters():
    assert letters("A RED boat-house; é2 the boat's") == ["a", "red", "boat", "house", "the", "boat", "s"]


@pytest.mark.parametrize(
    ("word", "pos", "lemma"),
    [
        ("buses", "n", "bus"),
        ("bus", "n", "bus"),
        ("glasses", "n", "glass"),
        ("knives", "n", "knife"),
        ("skis", "n", "ski"),
        ("men", "n", "men"),
        ("people", "n", "people"),
        ("bikers", "n", "bikers"),
        ("tables", "n", "tables"),
        ("seated", "v", "seat"),
        ("manning", "v", "man"),
        ("sank", "v", "sink"),
        ("kites", "v", "kit"),
        ("potted", "v", "pot"),
        ("potted", "a", "potted"),
        ("running", "v", "running"),
    ],
)
def test_wordnets_lemmas_of_words_that_are_looked_for(word, pos, lemma):
    assert builtin_lemma(word, pos, NOUNS) == lemma


def test_parts_of_speech_are_guessed_from_form_and_determiner():
    assert builtin_tags("a potted plant is seated near skiing buses in the seating".split()) == list("nannvnvnnnn")


def test_the_rules_differ_where_they_are_known_to():
    table = ObjectTable.coco()
    pattern, wordnet = (word_rule(name, table.vocabulary) for name in ("pattern", "wordnet"))
    assert pattern.read("a bus and two ties") == ["a", "bu", "and", "two", "ty"]
    assert wordnet.read("a bus and two ties") == ["a", "bus", "and", "two", "tie"]


def test_an_unknown_rule_is_refused():
    with pytest.raises(CsrError, match="no word rule 'stem'"):
        word_rule("stem")


def test_a_folder_without_nltk_data_is_refused(tmp_path):
    with pytest.raises(CsrError, match="no whole WordNet") as raised:
        word_rule("wordnet", nltk_data=tmp_path)
    assert "nltk.downloader" in raised.value.hint


def test_nltk_data_is_used_where_it_is_given(tmp_path, recwarn):
    """A WordNet of five nouns and two verbs, and a tagger that knows two verbs."""
    write_wordnet(tmp_path / "corpora" / "wordnet", nouns="dog bus man men woman", verbs="seat ski")
    write_tagger(tmp_path / "taggers" / "averaged_perceptron_tagger_eng", {"seated": "VBN", "skiing": "VBG"})
    rule = word_rule("wordnet", nltk_data=tmp_path)
    assert rule.source == {"wordnet": "nltk_data"}
    assert rule.read("Seated men and women, dogs skiing; buses.") == [
        "seat", "men", "and", "woman", ",", "dog", "ski", ";", "bus", ".",
    ]  # fmt: skip


def write_tagger(folder: Path, known: dict[str, str]) -> None:
    folder.mkdir(parents=True)
    parts = {"weights": {"bias": {"NN": 1.0}}, "tagdict": known, "classes": ["NN", *sorted(set(known.values()))]}
    for name, content in parts.items():
        (folder / f"averaged_perceptron_tagger_eng.{name}.json").write_text(json.dumps(content))


def write_wordnet(folder: Path, nouns: str, verbs: str) -> None:
    folder.mkdir(parents=True)
    lemmas = {"noun": nouns.split(), "verb": verbs.split(), "adj": [], "adv": []}
    for part, words in lemmas.items():
        lines = [f"{word} {part[0]} 1 0 1 0 00000000" for word in sorted(words)]
        (folder / f"index.{part}").write_text("".join(f"{line}\n" for line in lines))
        (folder / f"data.{part}").write_text("  1 made up\n")
        (folder / f"{part}.exc").write_text("")
    (folder / "lexnames").write_text("00\tadj.all\t3\n")
    (folder / "index.sense").write_text("")
