"""Test the scorer group, loading, and the reward of several columns, without models."""

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
    """Give every sentence the same score."""

    def __init__(self, name: str, value: float = 0.5) -> None:
        self.name, self.value, self.num_forgotten = name, value, 0

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        return [{self.name: self.value} for _ in items]

    def forget(self) -> None:
        self.num_forgotten += 1


class Limited(Constant):
    def num_over_length(self, sentences: Sequence[str]) -> int:
        return sum(len(text) > 5 for text in sentences)


def test_every_sentence_gets_every_column():
    group = ScorerGroup([Constant("a", 0.25), Constant("b", -1.0)])
    assert group.score(ITEMS) == [{"a": 0.25, "b": -1.0}] * 2
    assert group.score([]) == []
    group.forget()
    assert [scorer.num_forgotten for scorer in group.scorers] == [1, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.01, -2.0])
def test_a_score_that_is_not_a_cosine_is_rejected_and_names_the_prompt(value):
    class Bad(Constant):
        def score(self, items):
            return [{self.name: 0.1}, {self.name: value}]

    with pytest.raises(CsrError, match=r"scorer b returned .* for prompt two, sentence 'A tree\.'"):
        ScorerGroup([Constant("a"), Bad("b")]).score(ITEMS)


def test_a_missing_column_and_a_missing_row_are_rejected():
    class WrongColumn(Constant):
        def score(self, items):
            return [{"other": 0.1} for _ in items]

    class TooFew(Constant):
        def score(self, items):
            return [{self.name: 0.1}]

    with pytest.raises(CsrError, match="scorer a returned nan for prompt one"):
        ScorerGroup([WrongColumn("a")]).score(ITEMS)
    with pytest.raises(CsrError, match="1 scores for 2 sentences"):
        ScorerGroup([TooFew("a")]).score(ITEMS)


def test_long_sentences_are_counted_for_scorers_with_a_limit():
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
def custom_scorers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Provide a user's module of scorers."""

    class Custom(Constant):
        def __init__(self, config, device):
            super().__init__(config.name, 0.5 if device == "cpu" else 0.0)

    class Misnamed(Custom):
        def __init__(self, config, device):
            self.name = "other"

    class Broken:
        def __init__(self, config, device):
            self.name = config.name

    module = types.ModuleType("my_scorers")
    vars(module).update(Custom=Custom, Misnamed=Misnamed, Broken=Broken)
    monkeypatch.setitem(sys.modules, "my_scorers", module)


def test_a_custom_scorer(custom_scorers):
    config = ScorerConfig(path="python:my_scorers:Custom", name="custom", trust_import=True)
    assert load_scorer(config, "cpu").score(ITEMS) == [{"custom": 0.5}] * 2


def test_custom_code_runs_only_with_trust_import():
    with pytest.raises(CsrError, match="trust_import: true"):
        scorer_config(path="python:my_scorers:Custom")
    with pytest.raises(CsrError, match="trust_import: true"):
        resolve(REQUIRED | {"scorer": {"path": "a", "extra": [{"path": "python:os:system", "name": "b"}]}})


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere_to_be_found:Custom", "No module named"),
        ("my_scorers:Missing", "no attribute"),
        ("my_scorers:Misnamed", "has the name 'other', not 'clip'"),
        ("my_scorers:Broken", "lacks score, forget"),
        ("my_scorers", "cannot be created"),
    ],
)
def test_a_custom_scorers_problem_is_reported(custom_scorers, target, message):
    with pytest.raises(CsrError, match=message):
        load_scorer(ScorerConfig(path=f"python:{target}", trust_import=True), "cpu")


def test_several_scorers_and_those_that_the_reward_uses(custom_scorers):
    custom = {"path": "python:my_scorers:Custom", "trust_import": True}
    settings = custom | {"name": "a", "extra": [custom | {"name": "b"}]}
    assert scorer_config(**settings).used == "a"
    assert scorer_config(**settings, use="a+b").used == "a+b"
    assert load_scorer(scorer_config(**settings, use="a+b"), "cpu").score(ITEMS[:1]) == [{"a": 0.5, "b": 0.5}]
    with pytest.raises(CsrError, match="c is not a valid scorer; expected one of: a, b"):
        load_scorer(scorer_config(**settings, use="a+c"), "cpu")
    with pytest.raises(CsrError, match="must be distinct"):
        scorer_config(**custom, name="a", extra=[custom | {"name": "a"}])


def test_an_unknown_option_of_an_extra_scorer_is_named():
    with pytest.raises(CsrError, match=r"unknown option scorer\.extra\.0\.nmae") as caught:
        resolve(REQUIRED | {"scorer": {"path": "a", "extra": [{"path": "b", "nmae": "c"}]}})
    assert caught.value.hint == "did you mean scorer.extra.0.name?"


class Numbered(Constant):
    """Score 0.01 times the number in the image's name, minus 0.001 per character of the sentence."""

    def score(self, items):
        return [{self.name: int(Path(p.image).stem) / 100 - len(text) / 1000} for p, text in items]


def test_every_sentence_is_also_scored_against_the_next_images():
    prompts = [Prompt(f"p{i}", f"/images/{i}.png", "?") for i in range(4)]
    same_image = Prompt("p0b", "/images/0.png", "Another question about the first image?")
    group = ScorerGroup([Numbered("a")])
    group.set_negative_images([prompts[0], same_image, *prompts[1:]], 2)
    rows = group.score([(prompts[0], "one"), (same_image, "one"), (prompts[3], "one")])
    # The negatives of image 0 are 1 and 2, of image 3 they are 0 and 1; the sentence subtracts 0.003 everywhere.
    assert [row["a"] for row in rows] == pytest.approx([-0.003, -0.003, 0.027])
    assert [row["a:others"] for row in rows] == pytest.approx([0.012, 0.012, 0.002])
    assert group.score([(prompts[3], "one"), (prompts[0], "one")]) == [rows[2], rows[0]], (
        "scores do not depend on the other items"
    )
    group.set_negative_images(prompts[:2], 16)
    assert group.score([(prompts[0], "one")])[0]["a:others"] == pytest.approx(0.007), "limited to the images there are"
    group.set_negative_images(prompts[:1], 16)
    assert set(group.score([(prompts[0], "one")])[0]) == {"a"}, "a single image has no negatives"
    group.set_negative_images(prompts, 2)
    group.forget()
    assert set(group.score([(prompts[0], "one")])[0]) == {"a"}
