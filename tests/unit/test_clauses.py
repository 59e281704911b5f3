"""Split long sentences, with limits in words so that every split can be checked by eye."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csr_vlm.scoring.clauses import split_clauses


def at_most(limit: int):
    return lambda text: len(text.split()) <= limit


@pytest.mark.parametrize(
    ("sentence", "limit", "expected"),
    [
        ("A dog runs.", 3, ["A dog runs."]),
        ("A dog runs, a cat sits, a bird sings.", 6, ["A dog runs, a cat sits,", "a bird sings."]),
        ("A dog runs and a cat sits.", 4, ["A dog runs", "and a cat sits."]),
        ("A band of sand by the sea.", 4, ["A band of sand", "by the sea."]),
        ("One two three four five, six.", 3, ["One two three", "four five, six."]),
        ("  A   dog,\n a cat. ", 2, ["A dog,", "a cat."]),
    ],
    ids=["fits", "commas", "before and", "no and inside words", "no boundary", "white space"],
)
def test_splits_at_clauses_and_otherwise_between_words(sentence, limit, expected):
    assert split_clauses(sentence, at_most(limit)) == expected


def test_a_word_that_does_not_fit_is_a_piece_of_its_own():
    assert split_clauses("so unbelievably long", lambda text: len(text) <= 6) == ["so", "unbelievably", "long"]


@given(st.lists(st.sampled_from(["a", "dog", "and", "cat,", "it;", "but", "blue."]), min_size=1), st.integers(1, 9))
def test_every_piece_fits_and_nothing_is_lost(words, limit):
    pieces = split_clauses(" ".join(words), at_most(limit))
    assert " ".join(pieces) == " ".join(words)
    assert all(len(piece.split()) <= limit for piece in pieces)
