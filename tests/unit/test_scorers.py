"""Scorers without models: the group, the factory, and what the reward makes of several columns."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest

from csr_vlm.config.load import resolve, scorer_config
from csr_vlm.config.schema import RewardConfig, ScorerConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt
from csr_vlm.method.reward import image_score
from csr_vlm.scoring.registry import load_scorer
from csr_vlm.scoring.scorer import ScorerGroup
from tests.unit.builders import REQUIRED, node, prompt

ITEMS = [(prompt("one"), "A boat."), (prompt("two"), "A tree.")]


class Constant:
    """Gives every sentence the value it was made with."""

    def __init__(self, name: str, value: float = 0.5) -> None:
        self.name, self.value, self.forgotten = name, value, 0

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        return [{self.name: self.value} for _ in items]

    def forget(self) -> None:
        self.forgotten += 1


class Limited(Constant):
    def num_over_length(self, sentences: Sequence[str]) -> int:
        return sum(len(text) > 5 for text in sentences)


def test_every_sentence_gets_every_column():
    group = ScorerGroup([Constant("a", 0.25), Constant("b", -1.0)])
    assert group.score(ITEMS) == [{"a": 0.25, "b": -1.0}] * 2
    assert group.score([]) == []
    group.forget()
    assert [scorer.forgotten for scorer in group.scorers] == [1, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.01, -2.0])
def test_a_value_that_is_no_cosine_is_refused_and_its_prompt_named(value):
    class Bad(Constant):
        def score(self, items):
            return [{self.name: 0.1}, {self.name: value}]

    with pytest.raises(CsrError, match=r"scorer b gives .* to prompt two, sentence 'A tree\.'"):
        ScorerGroup([Constant("a"), Bad("b")]).score(ITEMS)


def test_a_missing_column_and_a_missing_row_are_refused():
    class Elsewhere(Constant):
        def score(self, items):
            return [{"other": 0.1} for _ in items]

    class Short(Constant):
        def score(self, items):
            return [{self.name: 0.1}]

    with pytest.raises(CsrError, match="scorer a gives nan to prompt one"):
        ScorerGroup([Elsewhere("a")]).score(ITEMS)
    with pytest.raises(CsrError, match="1 scores for 2 sentences"):
        ScorerGroup([Short("a")]).score(ITEMS)


def test_long_sentences_are_counted_where_a_scorer_has_a_limit():
    assert ScorerGroup([Constant("a"), Limited("b")]).num_over_length(["short", "longer", "longer"]) == {"b": 2}


def test_the_mean_of_several_columns():
    """max(100 x 0.3, 0) = 30 and max(100 x -0.5, 0) = 0: the mean is 15, not 100 x -0.1."""
    sentence = node("0", cosine=0.3)
    sentence.cosines["siglip"] = -0.5
    assert image_score(sentence, "clip", RewardConfig()) == pytest.approx(30.0)
    assert image_score(sentence, "siglip", RewardConfig()) == 0.0
    assert image_score(sentence, "clip+siglip", RewardConfig()) == pytest.approx(15.0)
    with pytest.raises(CsrError, match="no score by 'other'"):
        image_score(sentence, "clip+other", RewardConfig())


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's."""

    class Mine(Constant):
        def __init__(self, config, device):
            super().__init__(config.name, 0.5 if device == "cpu" else 0.0)

    class Anonymous(Mine):
        def __init__(self, config, device):
            self.name = "anonymous"

    class Broken:
        def __init__(self, config, device):
            self.name = config.name

    module = types.ModuleType("my_scorers")
    vars(module).update(Mine=Mine, Anonymous=Anonymous, Broken=Broken)
    monkeypatch.setitem(sys.modules, "my_scorers", module)


def test_a_scorer_of_ones_own(own):
    config = ScorerConfig(path="python:my_scorers:Mine", name="mine", trust_import=True)
    assert load_scorer(config, "cpu").score(ITEMS) == [{"mine": 0.5}] * 2


def test_code_runs_only_where_it_was_asked_for():
    with pytest.raises(CsrError, match="trust_import: true"):
        scorer_config(path="python:my_scorers:Mine")
    with pytest.raises(CsrError, match="trust_import: true"):
        resolve(REQUIRED | {"scorer": {"path": "a", "extra": [{"path": "python:os:system", "name": "b"}]}})


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere_to_be_found:Mine", "No module named"),
        ("my_scorers:Missing", "no attribute"),
        ("my_scorers:Anonymous", "calls itself 'anonymous', not 'clip'"),
        ("my_scorers:Broken", "lacks score, forget"),
        ("my_scorers", "cannot be made"),
    ],
)
def test_what_is_wrong_with_ones_own_is_said(own, target, message):
    with pytest.raises(CsrError, match=message):
        load_scorer(ScorerConfig(path=f"python:{target}", trust_import=True), "cpu")


def test_several_scorers_and_the_one_that_the_reward_uses(own):
    mine = {"path": "python:my_scorers:Mine", "trust_import": True}
    settings = mine | {"name": "a", "extra": [mine | {"name": "b"}]}
    assert scorer_config(**settings).used == "a"
    assert scorer_config(**settings, use="a+b").used == "a+b"
    assert load_scorer(scorer_config(**settings, use="a+b"), "cpu").score(ITEMS[:1]) == [{"a": 0.5, "b": 0.5}]
    with pytest.raises(CsrError, match="names c, which no scorer is"):
        load_scorer(scorer_config(**settings, use="a+c"), "cpu")
    with pytest.raises(CsrError, match="must be distinct"):
        scorer_config(**mine, name="a", extra=[mine | {"name": "a"}])


def test_an_unknown_option_of_an_extra_scorer_is_named():
    with pytest.raises(CsrError, match=r"unknown option scorer\.extra\.0\.nmae") as caught:
        resolve(REQUIRED | {"scorer": {"path": "a", "extra": [{"path": "b", "nmae": "c"}]}})
    assert caught.value.hint == "did you mean scorer.extra.0.name?"


class Numbered(Constant):
    """Cosine 0.01 times the number in the image's name, less the sentence's length in thousandths."""

    def score(self, items):
        return [{self.name: int(Path(p.image).stem) / 100 - len(text) / 1000} for p, text in items]


def test_every_sentence_meets_the_next_images_too():
    prompts = [Prompt(f"p{i}", f"/images/{i}.png", "?") for i in range(4)]
    again = Prompt("p0b", "/images/0.png", "Another question about the first image?")
    group = ScorerGroup([Numbered("a")])
    group.set_negative_images([prompts[0], again, *prompts[1:]], 2)
    rows = group.score([(prompts[0], "one"), (again, "one"), (prompts[3], "one")])
    # Image 0 meets 1 and 2, image 3 meets 0 and 1; the sentence costs 0.003 everywhere.
    assert [row["a"] for row in rows] == pytest.approx([-0.003, -0.003, 0.027])
    assert [row["a:others"] for row in rows] == pytest.approx([0.012, 0.012, 0.002])
    assert group.score([(prompts[3], "one"), (prompts[0], "one")]) == [rows[2], rows[0]], "whatever else is scored"
    group.set_negative_images(prompts[:2], 16)
    assert group.score([(prompts[0], "one")])[0]["a:others"] == pytest.approx(0.007), "no more than there are"
    group.set_negative_images(prompts[:1], 16)
    assert set(group.score([(prompts[0], "one")])[0]) == {"a"}, "a single image has no others"
    group.set_negative_images(prompts, 2)
    group.forget()
    assert set(group.score([(prompts[0], "one")])[0]) == {"a"}
