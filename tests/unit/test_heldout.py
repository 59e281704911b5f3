"""Test held-out prompts and the label-free metrics of the responses to them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csr_vlm.core.records import Candidate, Finish, Prompt
from csr_vlm.data.prompts import hold_out
from csr_vlm.evaluation.heldout import evaluate, split_sentences, tallies
from csr_vlm.method.sentences import SentenceRule
from csr_vlm.scoring.scorer import ScorerGroup
from tests.unit.builders import prompt


def held_out(total: int, number: int) -> tuple[list[Prompt], list[Prompt]]:
    heldout: list[Prompt] = []
    kept = list(hold_out((prompt(str(i)) for i in range(total)), number, heldout))
    return kept, heldout


@given(st.integers(0, 100), st.integers(0, 40))
def test_holding_out_keeps_every_prompt_and_takes_the_last_ones(total, number):
    kept, heldout = held_out(total, number)
    assert kept + heldout == [prompt(str(i)) for i in range(total)]
    assert len(heldout) == min(number, total // 8)


@pytest.mark.parametrize(("total", "number", "expected"), [(7, 32, 0), (8, 32, 1), (255, 32, 31), (1000, 32, 32)])
def test_at_most_an_eighth_of_the_prompts_is_held_out(total, number, expected):
    assert len(held_out(total, number)[1]) == expected


def test_prompts_are_yielded_while_later_ones_are_still_being_read():
    read = []

    def source():
        for i in range(50):
            read.append(i)
            yield prompt(str(i))

    first = next(hold_out(source(), 3, []))
    assert first == prompt("0")
    assert len(read) == 4, "no more is held than what may stay out"


def test_the_held_out_prompts_are_known_only_at_the_end():
    heldout: list[Prompt] = []
    passing = hold_out((prompt(str(i)) for i in range(16)), 2, heldout)
    for _ in range(14):
        next(passing)
        assert heldout == []
    assert list(passing) == []
    assert heldout == [prompt("14"), prompt("15")]


def test_tallies_by_hand():
    sentences = ["A red boat.", "A car.", "Boat a red.", "A car."]
    assert tallies(sentences, [30.0, 10.0, 20.0, 12.0], complete=True) == {
        "sentences": (4, 1),
        "words": (10, 1),
        "repeats": (2, 1),  # the third has the words of the first, the fourth those of the second
        "complete": (1, 1),
        "relevance": (18.0, 1),
    }


def test_tallies_of_an_empty_response():
    assert tallies([], [], complete=False) == {
        "sentences": (0, 1),
        "words": (0, 1),
        "repeats": (0, 1),
        "complete": (0, 1),
        "relevance": (0.0, 0),  # no response to be relevant
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A boat. A car.", ["A boat.", "A car."]),
        ("A boat. A ca", ["A boat.", "A ca"]),
        (" It costs 3.5 euros.\nAsk Dr. Low. ", ["It costs 3.5 euros.", "Ask Dr. Low."]),
        ("Boat.Car.", ["Boat.Car."]),
        ("A boat. ...", ["A boat."]),
        ("A boat.)", ["A boat.)"]),
        ("A boat", ["A boat"]),
        ("...", []),
        ("  ", []),
        ("", []),
    ],
)
def test_a_text_is_split_into_sentences(text, expected):
    assert list(split_sentences(text, SentenceRule("."))) == expected


def test_sentences_end_at_other_delimiters():
    assert list(split_sentences("A boat! A car? A fish.", SentenceRule("!?"))) == ["A boat!", "A car?", "A fish."]
    assert list(split_sentences("船。車。", SentenceRule("。"))) == ["船。", "車。"]


@given(st.text(alphabet="ab. 1\n", max_size=40))
def test_splitting_keeps_every_word_in_order(text):
    found = list(split_sentences(text, SentenceRule(".")))
    assert "".join("".join(found).split()).rstrip(".") == "".join(text.split()).rstrip(".") or not any(
        char.isalnum() for char in text
    )
    assert all(any(char.isalnum() for char in part) and part == part.strip() for part in found)


class FakeEngine:
    """Return scripted responses, and record the calls."""

    def __init__(self, responses: dict[str, tuple[str, Finish]]) -> None:
        self.responses = responses
        self.chunks: list[int] = []
        self.limits: set[int] = set()
        self.forgotten = 0

    def respond(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Candidate]:
        self.chunks.append(len(prompts))
        self.limits.add(max_new_tokens)
        found = [self.responses[p.prompt_id] for p in prompts]
        return [Candidate(token_ids=(), token_logprobs=(), text=text, finish=finish) for text, finish in found]

    def forget(self) -> None:
        self.forgotten += 1


class FakeScorer:
    """Score a boat high and a ghost below zero for every image."""

    name = "clip"

    def __init__(self) -> None:
        self.forgotten = 0

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        return [{"clip": 0.3 if "boat" in sentence else -0.1 if "ghost" in sentence else 0.2} for _, sentence in items]

    def forget(self) -> None:
        self.forgotten += 1


def test_evaluation_by_hand():
    engine = FakeEngine(
        {
            "a": (" A boat. A car. A boat.", Finish.EOS),
            "b": (" A ghost. A bo", Finish.LENGTH),
            "c": ("", Finish.EOS),
        }
    )
    found = evaluate(engine, ScorerGroup([FakeScorer()]), [prompt(name) for name in "abc"], 24)
    values = {name: metric["value"] for name, metric in found["metrics"].items()}
    assert values == pytest.approx(
        {
            "sentences": (3 + 2 + 0) / 3,
            "words": (6 + 4 + 0) / 3,
            "repeats": 1 / 3,
            "complete": 2 / 3,
            # Negative cosines count as 0 (eq. 3); an empty response has no relevance.
            "relevance": ((30 + 20 + 30) / 3 + (0 + 20) / 2) / 2,
        }
    )
    assert [(row["id"], row["text"]) for row in found["rows"]] == [
        ("a", "A boat. A car. A boat."),
        ("b", "A ghost. A bo"),
        ("c", ""),
    ]
    assert found["protocol"]["num_prompts"] == 3
    assert found["protocol"]["max_new_tokens"] == 24
    assert engine.limits == {24}


def test_evaluation_does_not_depend_on_batches():
    names = [f"{i:03}" for i in range(150)]
    engine = FakeEngine({name: (" A boat." * (i % 4), Finish.EOS) for i, name in enumerate(names)})
    scorer = FakeScorer()
    prompts = [prompt(name) for name in names]
    found = evaluate(engine, ScorerGroup([scorer]), prompts, 8)
    assert engine.chunks == [64, 64, 22]
    assert engine.forgotten == scorer.forgotten == 3, "images of one batch are not kept for the next"
    again = evaluate(engine, ScorerGroup([scorer]), prompts[::-1], 8)
    assert again["rows"] == found["rows"][::-1]
    assert [row["tallies"]["sentences"][0] for row in found["rows"]] == [i % 4 for i in range(150)]
