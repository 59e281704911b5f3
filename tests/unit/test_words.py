"""Test the word rules on words whose forms can be looked up."""

from __future__ import annotations

import json
from pathlib import Path

import nltk
import pytest
from hypothesis import given
from hypothesis import strategies as st

from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.singular import singularize
from csr_vlm.evaluation.words import letters, tokenize, word_rule


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
def test_singular_forms_reproduce_the_librarys_mistakes(word, singular):
    assert singularize(word) == singular


@given(st.text(max_size=30))
def test_every_token_has_a_singular_and_every_text_can_be_read(text):
    assert isinstance(singularize(text.lower()), str)
    for name in ("pattern", "plain"):
        assert all(isinstance(word, str) for word in word_rule(name).read(text))


def test_a_period_is_a_token_at_the_end_of_a_sentence_but_not_in_an_abbreviation():
    assert tokenize("Dr. Smith's dog can't wait. It's 3 p.m. now.") == [
        "dr.", "smith", "'s", "dog", "ca", "n't", "wait", ".", "it", "'s", "3", "p.m.", "now", ".",
    ]  # fmt: skip


def test_plain_words_are_runs_of_letters():
    assert letters("A RED boat-house; é2 the boat's") == ["a", "red", "boat", "house", "the", "boat", "s"]


def test_the_rules_differ_on_words_that_pattern_misreads(tmp_path):
    write_wordnet(tmp_path / "corpora" / "wordnet", nouns="bus tie", verbs="")
    write_tagger(tmp_path / "taggers" / "averaged_perceptron_tagger_eng", {})
    assert word_rule("pattern").read("a bus and two ties") == ["a", "bu", "and", "two", "ty"]
    assert word_rule("wordnet", nltk_data=tmp_path).read("a bus and two ties") == ["a", "bus", "and", "two", "tie"]


def test_an_unknown_rule_is_refused():
    with pytest.raises(CsrError, match="'stem' is not a valid word rule") as raised:
        word_rule("stem")
    assert raised.value.hint == "expected one of: pattern, wordnet, plain"


def test_wordnet_is_refused_without_nltk_data_and_the_hint_names_the_download_command(tmp_path, monkeypatch):
    with pytest.raises(CsrError, match=f"needs nltk's WordNet and English tagger in {tmp_path}") as raised:
        word_rule("wordnet", nltk_data=tmp_path)
    assert f"python -m nltk.downloader -d {tmp_path} wordnet averaged_perceptron_tagger_eng" in raised.value.hint
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(CsrError, match="needs nltk's WordNet and English tagger: ") as raised:
        word_rule("wordnet")
    assert "python -m nltk.downloader wordnet averaged_perceptron_tagger_eng" in raised.value.hint
    assert "--words pattern" in raised.value.hint


def test_wordnet_is_refused_where_only_the_tagger_is_missing(tmp_path):
    write_wordnet(tmp_path / "corpora" / "wordnet", nouns="dog", verbs="seat")
    with pytest.raises(CsrError, match="'averaged_perceptron_tagger_eng' not found"):
        word_rule("wordnet", nltk_data=tmp_path)


def test_wordnet_reads_with_the_nltk_data_that_it_is_given(tmp_path, recwarn):
    """Use a WordNet of five nouns and two verbs, and a tagger that knows two verbs."""
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
