"""Test the world prose: its scenes, its language, and the reading of its sentences."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csr_vlm.evaluation import chair
from csr_vlm.evaluation.objects import ObjectTable
from csr_vlm.world import prose_wordings as words
from csr_vlm.world.coco import instances, synonyms
from csr_vlm.world.corpus import questions
from csr_vlm.world.dataset import scene_of, write_images
from csr_vlm.world.prose_captions import (
    ProseStyle,
    Thing,
    answer_why,
    dialogue,
    joined,
    short_questions,
    side_of,
    write,
)
from csr_vlm.world.prose_check import (
    Bound,
    Response,
    ScoredText,
    error_correlation,
    judge_metrics,
    kind_of,
    policy_metrics,
    sentences_of,
)
from csr_vlm.world.prose_judge import NUM_SETTINGS, AltTextStyle, alt_text, batches_of_few_settings
from csr_vlm.world.prose_scenes import (
    COMPANIONS,
    NUM_CELLS,
    PROSE,
    SETTINGS,
    SIDE,
    SYNONYMS,
    Group,
    PlacedObject,
    ProseScene,
    draw_scene,
)
from csr_vlm.world.prose_vision import PATCHES, patch_labels
from csr_vlm.world.scenes import HARBOUR, MARKET, Split, make_scene, make_scenes, random_stream, render
from csr_vlm.world.shapes import RGB
from csr_vlm.world.truth import judge, mentions, reader_of

READER = reader_of(PROSE)
indices = st.integers(0, 10**6)


def scene_at(index: int) -> ProseScene:
    return draw_scene(Split.CORPUS, 7, index)


@pytest.fixture(scope="module")
def written() -> list[tuple[ProseScene, list]]:
    """Scenes and descriptions of them, one in ten a list."""
    scenes = [scene_at(index) for index in range(1500)]
    return [
        (scene, write(scene, ProseStyle(), random_stream("test", scene.scene_id), listed=number % 10 == 0))
        for number, scene in enumerate(scenes)
    ]


# Scenes


def test_the_world_has_what_both_others_have_and_more():
    assert set(PROSE.kinds) > {*HARBOUR.kinds, *MARKET.kinds}
    assert len(PROSE.kinds) == len(set(PROSE.kinds)) >= 30
    assert set(PROSE.colors) <= set(RGB)
    for setting in SETTINGS.values():
        assert {*setting.kinds, setting.habit} <= set(PROSE.kinds)
        assert len(set(setting.moods)) == 3
    assert set(COMPANIONS) <= set(PROSE.kinds)
    for trigger, pair in COMPANIONS.items():
        assert pair.companion in PROSE.kinds
        assert pair.companion != trigger
        assert pair.color in PROSE.colors


@given(indices)
@settings(max_examples=150, deadline=None)
def test_scenes_are_what_the_world_allows(index):
    scene = scene_at(index)
    assert 3 <= len(scene.objects) <= 8
    assert 3 <= len(scene.groups) <= 5
    taken = set()
    for item in scene.objects:
        left, top = item.corner
        assert min(left, top) >= 0
        assert max(left, top) + item.size <= SIDE
        row, column = divmod(item.cell, NUM_CELLS)
        block = {(row + r, column + c) for r in range(item.span) for c in range(item.span)}
        assert not taken & block, "no object covers another"
        taken |= block
    for group in scene.groups:
        assert 1 <= group.count <= 3
        assert {item.color for item in group.objects} == {group.color}
        assert scene.group_of(group.kind) == group
    assert scene.group_of("nothing") is None


def test_sizes_differ_by_a_factor_of_three():
    sizes = [item.size for index in range(300) for item in scene_at(index).objects]
    assert max(sizes) >= 3 * min(sizes)


def test_every_setting_and_count_comes_up():
    scenes = [scene_at(index) for index in range(600)]
    assert {scene.setting for scene in scenes} == set(SETTINGS)
    assert {len(scene.objects) for scene in scenes} == set(range(3, 9))
    assert {group.count for scene in scenes for group in scene.groups} == {1, 2, 3}


def test_a_name_gives_the_scene_again_and_splits_differ(tmp_path):
    scene = make_scene(PROSE, Split.TEST, 3, 12)
    assert scene_of(scene.scene_id) == (PROSE, scene)
    assert render(scene).tobytes() == render(make_scene(PROSE, Split.TEST, 3, 12)).tobytes()
    assert scene.objects != make_scene(PROSE, Split.DEVELOPMENT, 3, 12).objects
    (prompt,) = write_images([scene], tmp_path)
    assert prompt.text in PROSE.describe


def test_pictures_show_every_object_in_its_color_and_the_backdrop_elsewhere():
    for index in range(20):
        scene = scene_at(index)
        pixels = np.asarray(render(scene)).astype(int)
        assert pixels.shape == (SIDE, SIDE, 3)
        backdrop = np.asarray(scene.backdrop()).astype(int)
        inside = np.zeros((SIDE, SIDE), dtype=bool)
        for item in scene.objects:
            left, top = item.corner
            patch = pixels[top : top + item.size, left : left + item.size]
            assert (np.abs(patch - RGB[item.color]).sum(-1) < 30).mean() > 0.05
            inside[top : top + item.size, left : left + item.size] = True
        assert (pixels == backdrop)[~inside].all()
    assert render(scene, scale=2).size == (2 * SIDE, 2 * SIDE)


def test_patch_labels_of_a_hand_made_scene():
    item = PlacedObject("boat", "red", cell=5, offset=(0, 0), size=44)
    scene = ProseScene("prose-corpus-0-0", Split.CORPUS, (item,), (247, 247, 247), "beach")
    kinds, colors, offsets = (part.reshape(PATCHES, PATCHES, *part.shape[1:]) for part in patch_labels(scene))
    # Cell 5 is row 1, column 1; a large object covers cells 5, 6, 9, 10: patches 2 to 5 both ways.
    boat, red = 1 + PROSE.kinds.index("boat"), PROSE.colors.index("red")
    assert (kinds[2:6, 2:6] == boat).all()
    assert (kinds > 0).sum() == (colors >= 0).sum() == 16
    assert (colors[2:6, 2:6] == red).all()
    assert offsets[2, 2].tolist() == [1.5, 1.5]
    assert item.center == (0.5, 0.5)


def test_boxes_are_exported_as_they_are_drawn():
    scene = scene_at(3)
    found = instances(PROSE, [scene])
    assert found["images"][0]["width"] == SIDE
    boxes = [annotation["bbox"] for annotation in found["annotations"]]
    assert boxes == [[*item.corner, item.size, item.size] for item in scene.objects]


# Language


def wordings() -> dict[str, tuple[str, ...]]:
    names = "LEAD DETAIL TAIL RELATION ATTRIBUTE BACKGROUND EMPTY_BACKGROUND MOOD ITEM".split()
    return {name: getattr(words, name) for name in names}


def test_every_kind_of_sentence_has_ten_wordings():
    for name, options in wordings().items():
        assert len(set(options)) == len(options) >= 10, name


def test_no_wording_names_an_object():
    phrases = [
        part for options in (*words.SIDES.values(), *words.RELATIONS.values(), words.ANYWHERE) for part in options
    ]
    phrases += [text for setting in SETTINGS.values() for text in (setting.place, setting.scene, *setting.moods)]
    phrases += [text for options in wordings().values() for text in options]
    phrases += [*words.LIST_OPENING, *PROSE.describe, *(text for pair in words.REASON for text in pair)]
    phrases += [
        form for forms in (*words.VERBS.values(), *words.NUMBERS.values(), *words.SIZES.values()) for form in forms
    ]
    for phrase in phrases:
        assert READER.read(re.sub(r"\{\w+\}", "x", phrase)).objects == (), phrase


def test_every_word_and_its_plural_is_read_as_its_kind():
    for line in SYNONYMS:
        for word in line:
            assert READER.read(f"There is a red {word}.").objects == (line[0],), word
            assert READER.read(f"Two {words.plural(word)} are there.").objects == (line[0],), word
    several = [word for line in SYNONYMS for word in line]
    assert len(several) == len(set(several))


def test_the_synonym_file_reads_back(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text(synonyms(PROSE), encoding="utf-8")
    assert ObjectTable.read(path, of_coco=False) == READER.table
    assert synonyms(HARBOUR).splitlines() == list(HARBOUR.kinds)


@given(indices, st.booleans())
@settings(max_examples=150, deadline=None)
def test_without_the_habit_nothing_is_made_up_and_colors_are_true(index, listed):
    scene = scene_at(index)
    text = joined(write(scene, ProseStyle(habit=0.0, mention=1.0), random_stream("x", index), listed))
    found = judge(PROSE, scene, text)
    assert found.hallucinated == ()
    assert found.recalled == scene.kinds
    assert found.colors_wrong == 0


@given(indices, st.booleans())
@settings(max_examples=150, deadline=None)
def test_descriptions_have_four_to_seven_sentences_and_the_check_reads_them_as_written(index, listed):
    scene = scene_at(index)
    sentences = write(scene, ProseStyle(), random_stream("y", index), listed)
    assert 4 <= len(sentences) <= 7
    text = joined(sentences)
    assert 40 <= len(text.split()) <= 95
    parts = sentences_of(text)
    assert parts == [sentence.text for sentence in sentences]
    assert [kind_of(part, at) for at, part in enumerate(parts)] == [sentence.kind for sentence in sentences]


def test_nearly_all_descriptions_have_45_to_90_words(written):
    lengths = [len(joined(sentences).split()) for _, sentences in written]
    assert np.mean([45 <= length <= 90 for length in lengths]) > 0.99


def test_what_is_made_up_is_by_habit_and_grows_along_a_response(written):
    usual = {pair.companion for pair in COMPANIONS.values()} | {setting.habit for setting in SETTINGS.values()}
    false, named = Counter(), Counter()
    for scene, sentences in written:
        for position, sentence in enumerate(sentences):
            verdict = chair.check_mentions(READER.read(sentence.text), scene.kinds)
            assert set(verdict.hallucinated) <= usual
            false[position] += len(verdict.hallucinated)
            named[position] += len(verdict.mentioned)
    rates = [false[position] / named[position] for position in range(5)]
    assert rates[0] < 0.03
    assert rates == sorted(rates)
    assert rates[4] > 0.25


def test_sentences_name_one_to_three_things_and_use_synonyms_plurals_and_bare_nouns(written):
    text = " ".join(joined(sentences) for _, sentences in written)
    named = Counter(len(READER.read(s.text).objects) for _, sentences in written for s in sentences)
    assert min(named[1], named[2], named[3]) > 100
    for word in ("ships", "lanterns", "puppy", "people", "street sign"):
        assert word in text
    assert re.search(r"\bwith (?:\w+ )?(?:books|boats|trees|cats|dogs|birds|balls)\b", text)
    assert re.search(r"\b(?:It|They) (?:is|are|looks|look)\b", text)


def test_one_prompt_in_ten_asks_for_a_list_and_gets_one():
    found = []
    for index in range(2000):
        (turn, *others) = dialogue(scene_at(index), ProseStyle(captions=1.0), epoch=0)
        assert not others
        assert ("\n- " in turn.answer) == (turn.question == PROSE.describe[-1])
        found.append("\n- " in turn.answer)
    assert 0.08 < np.mean(found) < 0.12


def test_yes_and_no_are_balanced():
    answers = Counter(
        turn.answer for index in range(1500) for turn in questions(PROSE, scene_at(index), random_stream("q", index), 4)
    )
    assert set(answers) == {"Yes.", "No."}
    assert 0.42 < answers["Yes."] / answers.total() < 0.58


def test_short_answers_are_true():
    for index in range(200):
        scene = scene_at(index)
        for turn in short_questions(scene, random_stream("s", index), 4):
            named = READER.read(turn.question).objects
            group = scene.group_of(named[0]) if named else None
            place = SETTINGS[scene.setting].place.capitalize()
            truths = {f"{place}."} if group is None else {
                f"{group.color.capitalize()}.", f"{['One', 'Two', 'Three'][group.count - 1]}."
            }  # fmt: skip
            assert turn.answer in truths


def test_reasons_name_what_is_there_first():
    for index in range(100):
        scene = scene_at(index)
        turn = answer_why(scene, ProseStyle(habit=0.0), random_stream("w", index))
        assert turn.question.endswith("?")
        named = READER.read(turn.answer).objects
        assert named
        assert set(named) <= scene.kinds


def test_alt_texts_name_one_or_two_things_that_are_there():
    counts = Counter()
    for index in range(500):
        scene = scene_at(index)
        named = READER.read(alt_text(scene, AltTextStyle(), random_stream("a", index))).objects
        assert set(named) <= scene.kinds
        counts[len(named)] += 1
    assert set(counts) == {1, 2}


def test_judge_batches_have_few_settings():
    first, again = (list(batches_of_few_settings(0, 8, 2, 100)) for _ in range(2))
    assert [[s.scene_id for s in scenes] for scenes in first] == [[s.scene_id for s in scenes] for scenes in again]
    for scenes in first:
        assert len(scenes) == 8
        assert len({scene.setting for scene in scenes}) <= NUM_SETTINGS < len(SETTINGS)


@pytest.mark.parametrize(
    ("point", "side"),
    [((0.1, 0.1), "left"), ((0.9, 0.5), "right"), ((0.5, 0.2), "top"), ((0.4, 0.9), "bottom"), ((0.5, 0.5), "middle")],
)
def test_sides(point, side):
    assert side_of(*point) == side


def test_a_thing_that_is_not_there_has_the_size_of_its_kind():
    assert Thing("boat", "red", 1, None).size_class == "large"
    small = PlacedObject("boat", "red", 0, (0, 0), 22)
    assert Thing.of(Group("boat", "red", (small,))).size_class == "medium"


# Judging


def hand_made() -> ProseScene:
    """Two red boats and a black dog on a beach."""
    return ProseScene(
        "prose-development-0-0",
        Split.DEVELOPMENT,
        (
            PlacedObject("boat", "red", 0, (0, 0), 42),
            PlacedObject("boat", "red", 2, (0, 0), 42),
            PlacedObject("dog", "black", 12, (0, 0), 22),
        ),
        (247, 247, 247),
        "beach",
    )


def test_a_hand_worked_response():
    text = (
        "The image shows two red ships on a sandy beach. A black puppy is placed on the left side, with a blue fish "
        "next to it. In the background, there is a street sign. The mood seems sunny, which suits the place well."
    )
    found = judge(PROSE, hand_made(), text)
    assert found.mentioned == ("boat", "dog", "fish", "sign")
    assert found.hallucinated == ("fish", "sign")
    assert found.recalled == {"boat", "dog"}
    assert (found.colors_right, found.colors_wrong) == (2, 0)
    assert mentions(PROSE, text)[:2] == [("boat", "red"), ("dog", "black")]
    assert [kind_of(part, at) for at, part in enumerate(sentences_of(text))] == ["lead", "detail", "background", "mood"]
    metrics = policy_metrics([Response(hand_made(), None, text, True)])  # type: ignore[arg-type]
    values = {name: metric.value for name, metric in metrics.items()}
    assert values["chair_s"] == 1
    assert values["chair_i"] == 0.5
    assert values["sentences"] == 4
    assert (values["false_at_1"], values["false_at_2"], values["false_at_3"]) == (0, 0.5, 1)


def test_judge_metrics_by_hand():
    sentences = [
        ScoredText("lead", 0, True, 0.4),
        ScoredText("detail", 1, True, 0.2),
        ScoredText("relation", 2, True, 0.1),
        ScoredText("detail", 3, False, 0.15),
        ScoredText("background", 4, False, 0.05),
        ScoredText("mood", 5, None, 0.01),
    ]
    claims = [ScoredText("lead", 0, True, 0.0), ScoredText("detail", 1, True, 0.2), ScoredText("detail", 3, False, 0.1)]
    found = judge_metrics(sentences, claims)
    # Of the four pairs (0.2, 0.1) x (0.15, 0.05) three are in order.
    assert found["auc_sentence"] == 0.75
    assert found["auc_claim"] == 1.0
    assert found["true_to_lead"] == pytest.approx(0.15 / 0.4)
    assert found["false_to_true"] == pytest.approx(0.1 / 0.15)
    assert found["mood_to_true"] == pytest.approx(0.01 / 0.15)


def test_errors_of_a_judge_correlate_with_themselves_and_not_with_noise():
    rng = np.random.default_rng(0)

    def scored(noise):
        return [ScoredText("detail", 1, at % 2 == 0, float(at % 2 + value)) for at, value in enumerate(noise)]

    one, other = rng.normal(size=(2, 4000))
    assert error_correlation(scored(one), scored(one)) == pytest.approx(1.0)
    assert abs(error_correlation(scored(one), scored(other))) < 0.05
    assert error_correlation(scored(one), scored(-one)) == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("value", "low", "high", "met"),
    [(0.5, 0.4, 0.6, True), (0.4, 0.4, None, True), (0.7, None, 0.6, False), (None, 0.0, None, False),
     (float("nan"), None, 1.0, False)],
)  # fmt: skip
def test_bounds_include_their_ends_and_refuse_what_is_undefined(value, low, high, met):
    assert Bound("x", value, low, high).met is met


def test_development_scenes_are_no_corpus_scenes():
    ids = [{scene.objects for scene in make_scenes(PROSE, split, 0, 200)} for split in Split]
    for one in range(len(ids)):
        for other in range(one):
            assert not ids[one] & ids[other]
