"""Test the comparison of hand-written texts with a hand-made scene."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csr_vlm.world.scenes import HARBOUR, Scene, SceneObject, Split, make_scene
from csr_vlm.world.truth import Judgement, judge, mentions
from tests.unit.builders import true_caption

SCENE = Scene(
    scene_id="harbour-test-0-000000",
    split=Split.TEST,
    objects=(
        SceneObject("boat", "red", 0, (0, 0), 20),
        SceneObject("tree", "green", 4, (0, 0), 20),
        SceneObject("ball", "blue", 8, (0, 0), 20),
    ),
    background=(255, 255, 255),
)


def judged(text: str) -> Judgement:
    return judge(HARBOUR, SCENE, text)


def test_a_correct_and_complete_description():
    assert judged("There is a red boat. There is a green tree. There is a blue ball.") == Judgement(
        mentioned=("boat", "tree", "ball"),
        hallucinated=(),
        recalled=frozenset({"boat", "tree", "ball"}),
        colors_right=3,
        colors_wrong=0,
        repeats=0,
        words=15,
    )


def test_a_hallucination():
    judgement = judged("There is a red boat. There is a red fish.")
    assert judgement.mentioned == ("boat", "fish")
    assert judgement.hallucinated == ("fish",)
    assert judgement.recalled == {"boat"}
    assert (judgement.colors_right, judgement.colors_wrong) == (1, 0), "an absent fish has no true color"


def test_every_mention_of_an_absent_object_counts():
    assert judged("A fish. Another fish, and a bird.").hallucinated == ("fish", "fish", "bird")


def test_a_wrong_color_is_not_a_hallucinated_object():
    judgement = judged("There is a blue boat. There is a green tree.")
    assert judgement.hallucinated == ()
    assert (judgement.colors_right, judgement.colors_wrong) == (1, 1)
    assert judgement.recalled == {"boat", "tree"}


def test_a_color_counts_only_directly_before_its_object():
    judgement = judged("The boat is blue. A red, large tree.")
    assert (judgement.colors_right, judgement.colors_wrong) == (0, 0)
    assert mentions(HARBOUR, "red boat; the boat") == [("boat", "red"), ("boat", None)]


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("There is a red boat. There is a red boat.", 1),
        ("There is a red boat. A tree. There is a red boat. there is a RED boat.", 2),
        ("There is a red boat. A red boat is there.", 1),
        ("There is a red boat. There is a blue boat.", 0),
        ("There is a red boat.", 0),
        ("", 0),
        ("...", 0),
        ("There is a red boat. There is a red boat", 1),
    ],
)
def test_repeats(text, repeats):
    assert judged(text).repeats == repeats


def test_repetition_does_not_increase_recall():
    once, twice = judged("A red boat."), judged("A red boat. A red boat.")
    assert once.recalled == twice.recalled == {"boat"}
    assert twice.mentioned == ("boat", "boat")
    assert twice.words == 6


def test_kinds_are_matched_as_whole_words_in_any_case():
    assert judged("A RED Boat!").mentioned == ("boat",)
    assert judged("A boathouse, a treetop and a steamboat.").mentioned == ()


def test_an_empty_text():
    assert judged("") == Judgement((), (), frozenset(), 0, 0, 0, 0)


@given(st.integers(0, 10**6))
def test_a_true_caption_has_no_errors(index):
    scene = make_scene(HARBOUR, Split.DEVELOPMENT, 0, index)
    judgement = judge(HARBOUR, scene, true_caption(scene))
    assert judgement.hallucinated == ()
    assert judgement.recalled == scene.kinds
    assert judgement.colors_right == len(scene.objects)
    assert judgement.colors_wrong == judgement.repeats == 0


@given(st.integers(0, 10**6), st.sampled_from(HARBOUR.kinds))
def test_an_added_kind_is_hallucinated_exactly_where_it_is_absent(index, kind):
    scene = make_scene(HARBOUR, Split.DEVELOPMENT, 0, index)
    judgement = judge(HARBOUR, scene, f"{true_caption(scene)} There is a {kind}.")
    assert judgement.hallucinated == (() if kind in scene.kinds else (kind,))
