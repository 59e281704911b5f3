"""Test the Python interface: light imports, the same results as the parts, errors with hints."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

import csr_vlm
from csr_vlm import Recipe, make_pairs, score, search
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Pair, Prompt
from csr_vlm.method.pairs import make_pairs as pairs_of
from csr_vlm.method.search import search as grow
from tests.unit.builders import REQUIRED, prompt
from tests.unit.test_layout import loaded_by
from tests.unit.test_search import RandomModel


class Lengths:
    """Score sentences by their length."""

    name = "lengths"

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        self.asked += [(prompt.image, sentence) for prompt, sentence in items]
        return [{self.name: len(sentence) / 100} for _, sentence in items]

    def forget(self) -> None:
        pass


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def test_names_come_when_they_are_asked_for_and_load_nothing_heavy():
    assert loaded_by("from csr_vlm import Recipe, Run, make_pairs, score, search") == []
    assert set(dir(csr_vlm)) == set(csr_vlm.__all__)
    with pytest.raises(AttributeError, match="serach"):
        _ = csr_vlm.serach


@pytest.mark.parametrize("name", csr_vlm.__all__)
def test_everything_public_is_described(name):
    assert inspect.getdoc(getattr(csr_vlm, name))


def test_a_recipe_is_changed_by_making_another():
    recipe = Recipe.of(**REQUIRED)
    other = recipe.changed("method.lambda=0.25", "iterations=1")
    assert (recipe.config.method.lambda_, other.config.method.lambda_, other.config.iterations) == (0.9, 0.25, 1)
    assert Recipe(recipe.config) == recipe
    with pytest.raises(CsrError, match=r"method\.lamda"):
        recipe.changed("method.lamda=1")


def test_captions_are_scored_sentence_by_sentence(picture):
    scorer = Lengths()
    found = score([(picture, "One. Three here costs 3.5 euros."), (str(picture), "")], scorer)
    assert [[(s.text, s.cosine) for s in caption] for caption in found] == [
        [("One.", 0.04), ("Three here costs 3.5 euros.", 0.27)],
        [],
    ]
    assert scorer.asked == [(str(picture), "One."), (str(picture), "Three here costs 3.5 euros.")]


def test_a_missing_picture_is_named(tmp_path):
    with pytest.raises(CsrError, match=r"nowhere\.png cannot be used: missing"):
        score([(tmp_path / "nowhere.png", "A boat.")], Lengths())


def test_a_scorer_goes_by_the_recipes_name(picture):
    with pytest.raises(CsrError, match=r"scorer\.name=lengths"):
        search([(picture, "What is it?")], Recipe.of(**REQUIRED), scorer=Lengths())


def test_pairs_of_trees_are_those_of_the_method():
    recipe = Recipe.of(**REQUIRED, preset="paper").changed("method.search.max_sentences=4")
    method = recipe.config.method
    model = RandomModel(salt=3)
    prompts = [prompt(f"prompt-{number}") for number in range(6)]
    trees = grow(prompts, model.propose, model.score, method, iteration=1, seed=0, scorer="clip")
    expected: list[Pair] = []
    for tree in trees:
        made = pairs_of(tree.prompt, tree.nodes, method, "clip", recipe.config.seed)
        expected += [] if isinstance(made, str) else made
    assert expected
    assert make_pairs(trees, recipe) == expected
    assert make_pairs(trees, recipe.changed("method.lambda=0")) != expected
    with pytest.raises(CsrError, match="pass the recipe"):
        make_pairs(trees)
