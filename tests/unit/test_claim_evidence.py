"""Test the marks of claims in a text, with a scorer whose numbers can be checked on paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from csr_vlm.core.records import Prompt
from csr_vlm.evaluation.claim_marker import ClaimMarker
from csr_vlm.method.claim_places import Level, Mark
from csr_vlm.scoring.scorer import ScorerGroup
from tests.unit.builders import config

MINE, *OTHERS = (Prompt(name, f"{name}.png", "What is here?") for name in ("mine", "a", "b", "c"))


class Table:
    """Score from a table; the other pictures have cosines 0, 0.1 and 0.2 with any text: mean 0.1."""

    name = "clip"

    def __init__(self, own: Mapping[str, float]) -> None:
        self.own = own
        self.asked: list[str] = []

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        self.asked += [text for prompt, text in items if prompt.image == MINE.image]
        others = {"a.png": 0.0, "b.png": 0.1, "c.png": 0.2}
        return [{self.name: others.get(prompt.image, self.own.get(text, 0.0))} for prompt, text in items]

    def forget(self) -> None:
        pass


def marker(own: Mapping[str, float], lexicon: str = "en", others: Sequence[Prompt] = OTHERS) -> ClaimMarker:
    return _marker(Table(own), lexicon, others)


def _marker(table: Table, lexicon: str = "en", others: Sequence[Prompt] = OTHERS) -> ClaimMarker:
    caption = "There is {a} {0}." if lexicon == "en" else "{0}"
    method = config(method={"claims": {"lexicon": lexicon, "caption": caption}}).method
    return ClaimMarker(ScorerGroup([table]), method, "clip", others)


def test_the_evidence_is_that_of_the_method() -> None:
    # The spread below the median of 0, 0.1 and 0.2 is 0.1 / sqrt(2); delta is the mean z of both things times 2 / 3.
    own = {"There is a boat.": 0.35, "There is a red boat.": 0.3, "There is a dog.": 0.0}
    marks = marker(own).marks(MINE, "A red boat. A dog sits there.")
    sigma = 0.1 / 2**0.5
    boat, red, dog = 0.25 / sigma, 0.2 / sigma, -0.1 / sigma
    delta = (boat + dog) / 3
    assert [mark.nats for mark in marks] == pytest.approx([delta * z - delta**2 / 2 for z in (red, dog)])
    assert [mark.thing for mark in marks] == ["red boat", "dog"]


def test_marks_cover_the_words_of_the_claim_wherever_they_stand() -> None:
    text = "There is a Red  boat. Two boats lie near a house, and the boat is red."
    marks = marker({}).marks(MINE, text)
    assert [text[mark.start : mark.end] for mark in marks] == ["Red  boat", "boats", "house"]


def test_a_language_without_spaces() -> None:
    text = "图片中有一只猫。"
    assert [text[mark.start : mark.end] for mark in marker({}, "zh").marks(MINE, text)] == ["猫"]


def test_a_claim_is_scored_once_a_picture() -> None:
    table = Table({})
    once = _marker(table)
    for _ in range(2):
        once.marks(MINE, "A dog. A dog.")
    assert table.asked == ["There is a dog."]


def test_without_other_pictures_there_is_no_evidence() -> None:
    assert marker({}, others=[MINE, OTHERS[0]]).marks(MINE, "A dog.") == []


@pytest.mark.parametrize(
    ("nats", "level"), [(1.0, Level.SUPPORTED), (0.9, Level.UNCLEAR), (-0.9, Level.UNCLEAR), (-1.0, Level.DOUBTED)]
)
def test_levels(nats: float, level: Level) -> None:
    assert Mark(0, 1, "dog", nats).level is level
