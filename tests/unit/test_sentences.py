"""Test where a sentence ends, with a table of cases for each rule."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csr_vlm.config.schema import DEFAULT_DELIMITERS
from csr_vlm.method import sentences
from csr_vlm.method.sentences import SentenceRule

ENDS = [
    ("There is a boat.", " There"),
    ("There is a boat.", "\n"),
    ("There is a boat. ", "There"),  # white space may belong to either side
    ("There is a boat.\n", "There"),
    ("There are 3.", " One"),
    ("It costs 3.50.", " Then"),
    ('He said "stop."', " Then"),
    ("He said “stop.”", " Then"),
    ("(There is a boat.)", " Then"),
    ("Well...", " And"),
    ("Well...", " "),
    ("In World War I.", " It"),
    ("No.", " There"),
    ("Is there a fig? No.", " There"),
    ("There is a fig.", " It"),
    ("1. A boat.", " 2"),
    ("The boat is at Dr. Low's.", " It"),
    ("Ask Dr.", "\n"),
    ("The end.", None),
    ("Ask Dr.", None),
    ("It costs 3.", None),
    ("Birds, fish, etc.", None),
    ('He said "stop."', None),
    ("1.", None),
    ("Well...", None),
]
GOES_ON = [
    ("", " There"),
    ("There is a boat", " on"),
    ("There is a boat", None),
    ("It costs 3.", "5"),
    ("It costs 3.5", " dollars"),
    ("See example.", "com"),
    ("Ask Dr.", " Low"),
    ("Ask Mrs.", " Low"),
    ("(Ask Dr.", " Low"),
    ("Animals, e.g.", " birds"),
    ("Animals, i.e.", " birds"),
    ("At 3 p.m.", " it"),
    ("By J.", " Smith"),
    ("J.", " Smith"),
    ("House No.", " 5"),
    ("House No. ", "5"),
    ("House No.", " "),  # the number may be the next token
    ("See Fig.", " 2"),
    ("1.", " A"),
    (" 12.", " A"),
    ("1.", "\n"),
    ("Well...", " and"),
    ("Well..", "."),
    ('He said "stop.', '"'),  # the closing quote still belongs to it
    ("(There is a boat.", ")"),
    ("...", " There"),
    (".", " There"),
    ("...", None),
    (' ".', None),
    ("There is a boat.", ""),  # a token without text carries no information
    ("There is a boat!", " There"),
    ("Is there a boat?", None),
]


@pytest.mark.parametrize(("text", "following"), ENDS)
def test_the_sentence_ends(text, following):
    assert SentenceRule(".").ends(text, following) is True


@pytest.mark.parametrize(("text", "following"), GOES_ON)
def test_the_sentence_continues(text, following):
    assert SentenceRule(".").ends(text, following) is False


@pytest.mark.parametrize(
    ("delimiters", "text", "following", "ends"),
    [
        (".!?", "Is there a boat?", " Yes", True),
        (".!?", "Look!", " A", True),
        (".!?", "Look!", None, True),
        (".!?", "Ask Dr.", " Low", False),
        (".!?", "What?", "!", False),
        (".!?", "What?!", " A", True),
        ("!?", "There is a boat.", " There", False),
        (",", "A boat,", " a", True),
        (",", "1,", "000", False),
        (";\n", "A boat;", " a", True),
        ("。", "有一条船。", "还", True),
        ("。！？", "有船吗？", "有", True),
        ("。", "他说“有船。", "”", False),
        ("。", "他说“有船。”", "我", True),
        ("。", "「船。", "」", False),
        ("。", "。", "有", False),
        (".", "有一条船。", "还", False),
        ("。！？", "真的吗？", "！", False),
        (DEFAULT_DELIMITERS, "- a cup", "\n- a plate", True),
        (DEFAULT_DELIMITERS, "- a cup\n", "- a plate", True),
        (DEFAULT_DELIMITERS, "**Objects:**", "\n", True),
        (DEFAULT_DELIMITERS, "- a cup", " and", False),
        (DEFAULT_DELIMITERS, "1.", "\n", False),
        (DEFAULT_DELIMITERS, "-", "\n", False),
        (DEFAULT_DELIMITERS, "a cup", None, False),
        (DEFAULT_DELIMITERS, "Is it 3.", "5", False),
        (DEFAULT_DELIMITERS, "Is it a cup?", " Yes", True),
        (DEFAULT_DELIMITERS, "有一条船。", "还", True),
        (".", "- a cup", "\n- a plate", False),
    ],
)
def test_other_delimiters(delimiters, text, following, ends):
    assert SentenceRule(delimiters).ends(text, following) is ends


@given(st.text(max_size=30), st.none() | st.text(max_size=5))
def test_only_a_delimiter_ends_any_text(text, following):
    ends = SentenceRule(".").ends(text, following)
    assert isinstance(ends, bool)
    assert not ends or "." in text


@given(st.text(alphabet="abc XYZ.123\n", max_size=20))
def test_a_final_delimiter_after_a_word_always_ends_the_response(text):
    assert SentenceRule(".").ends(f"a{text}.", None)


def test_a_markdown_answer_is_cut_into_its_items():
    text = "# Objects\n\n1. A cup\n2. A 3.5 m plate. It is red!\n- 一条船。一只狗"
    assert list(SentenceRule(DEFAULT_DELIMITERS).cut(text)) == [
        "# Objects", "1. A cup", "2. A 3.5 m plate.", "It is red!", "- 一条船。", "一只狗",
    ]  # fmt: skip


def test_the_documented_examples():
    assert doctest.testmod(sentences).attempted >= 2
    assert doctest.testmod(sentences).failed == 0
