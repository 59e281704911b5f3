"""The world's scenes, their pictures, captions and prompt files."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from statistics import fmean

import numpy as np
import pytest
from PIL import Image

from csr_vlm.config.schema import DataConfig
from csr_vlm.data.prompts import InputReport, read_prompts
from csr_vlm.world.corpus import (
    DESCRIBE,
    Style,
    absent_companions,
    caption,
    dialogue,
    questions,
    random_stream,
    yes_no_question,
)
from csr_vlm.world.dataset import scene_of, write_prompts
from csr_vlm.world.scenes import (
    CELL,
    GRID,
    HARBOUR,
    MARKET,
    WORLDS,
    Split,
    make_scene,
    make_scenes,
    parse_scene_id,
    render,
)
from csr_vlm.world.shapes import RGB, SHAPES, sprite
from csr_vlm.world.truth import mentions

NUM_SCENES = 4000

STYLE = Style(mention=0.95, usual_color=0.85, captions=0.6)


@pytest.fixture(scope="module")
def captions():
    """(scene, kinds its caption names in order), for many corpus scenes."""
    found = []
    for scene in make_scenes(HARBOUR, Split.CORPUS, 0, NUM_SCENES):
        text = caption(HARBOUR, scene, STYLE, random_stream("test", scene.scene_id))
        found.append((scene, [kind for kind, _ in mentions(HARBOUR, text)]))
    return found


def test_the_same_name_gives_the_same_scene_and_the_same_pixels():
    first, again = (make_scene(HARBOUR, Split.TEST, 1, 17) for _ in range(2))
    assert first == again
    assert render(first).tobytes() == render(again).tobytes()


def test_every_part_of_the_name_matters():
    base = make_scene(HARBOUR, Split.TEST, 1, 17)
    others = [
        make_scene(HARBOUR, Split.DEVELOPMENT, 1, 17),
        make_scene(HARBOUR, Split.TEST, 2, 17),
        make_scene(HARBOUR, Split.TEST, 1, 18),
    ]
    drawn = {(scene.objects, scene.background) for scene in (base, *others)}
    assert len(drawn) == 4


def test_splits_share_no_scene():
    drawn = {split: {render(s).tobytes() for s in make_scenes(HARBOUR, split, 0, 60)} for split in Split}
    assert all(len(pictures) == 60 for pictures in drawn.values())
    assert all(drawn[a].isdisjoint(drawn[b]) for a, b in combinations(Split, 2))


def test_a_stream_may_be_entered_anywhere():
    whole = list(make_scenes(HARBOUR, Split.TEST, 0, 10))
    assert list(make_scenes(HARBOUR, Split.TEST, 0, 4, start=6)) == whole[6:]


@pytest.mark.parametrize("split", Split)
def test_ids_round_trip(split):
    for scene in make_scenes(HARBOUR, split, 3, 5):
        assert parse_scene_id(HARBOUR, scene.scene_id) == scene
        assert scene_of(scene.scene_id) == (HARBOUR, scene)


@pytest.mark.parametrize("name", ["", "photo-17", "desert-test-0-000001", "harbour-exam-0-000001", "harbour-test-0-x"])
def test_ids_of_other_things_are_refused(name):
    with pytest.raises(ValueError):
        parse_scene_id(HARBOUR, name)
    assert scene_of(name) is None


def test_scenes_are_what_the_world_allows():
    counts = Counter()
    for scene in make_scenes(HARBOUR, Split.TEST, 0, 300):
        counts[len(scene.objects)] += 1
        cells = [item.cell for item in scene.objects]
        assert cells == sorted(set(cells)), "one object a cell, in reading order"
        assert 0 <= min(cells) <= max(cells) < GRID * GRID
        assert len(scene.kinds) == len(scene.objects), "one object a kind"
        assert scene.kinds <= set(HARBOUR.kinds)
        assert {item.color for item in scene.objects} <= set(HARBOUR.colors)
    assert set(counts) == {2, 3, 4}
    assert min(counts.values()) > 60


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_every_kind_and_colour_can_be_drawn(world):
    assert set(world.kinds) <= set(SHAPES)
    assert len(world.kinds) == len(set(world.kinds)) == 16
    assert set(world.colors) <= set(RGB)
    assert set(world.companions) <= set(world.kinds)
    assert {habit.companion for habit in world.companions.values()} <= set(world.kinds)
    assert {habit.color for habit in world.companions.values()} <= set(world.colors)


def test_the_worlds_share_no_kind():
    assert not set(HARBOUR.kinds) & set(MARKET.kinds)
    assert set(SHAPES) == {*HARBOUR.kinds, *MARKET.kinds}


def test_market_captions_name_two_objects_in_a_sentence_now_and_then():
    captions = [caption(MARKET, s, STYLE, random_stream(s.scene_id)) for s in make_scenes(MARKET, Split.CORPUS, 0, 400)]
    sentences = [part for text in captions for part in text.split(".") if part]
    assert 0.2 < fmean(" and " in part for part in sentences) < 0.45
    assert max(part.count(" and ") for part in sentences) == 1
    assert all(part.strip().startswith("I can see a") for part in sentences)
    assert any("an orange" in part for part in sentences)
    assert not any("a orange" in part for part in sentences)


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_all_sprites_differ(world):
    sprites = {(k, c): np.asarray(sprite(k, c, 21)) for k in world.kinds for c in world.colors}
    assert len({sprite.tobytes() for sprite in sprites.values()}) == 16 * 6
    shapes = [sprites[kind, "red"][..., 3] / 255 for kind in world.kinds]
    assert min(np.abs(a - b).mean() for a, b in combinations(shapes, 2)) > 0.05, "and not by a hair"


def test_objects_are_drawn_in_their_cell_and_colour():
    for scene in make_scenes(HARBOUR, Split.TEST, 0, 20):
        pixels = np.asarray(render(scene)).astype(int)
        assert pixels.shape == (GRID * CELL, GRID * CELL, 3)
        for item in scene.objects:
            row, column = divmod(item.cell, GRID)
            cell = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            assert (np.abs(cell - RGB[item.color]).sum(axis=-1) < 10).sum() > 20, item
        empty = set(range(GRID * GRID)) - {item.cell for item in scene.objects}
        for row, column in (divmod(cell, GRID) for cell in empty):
            inside = pixels[row * CELL + 4 : (row + 1) * CELL - 4, column * CELL + 4 : (column + 1) * CELL - 4]
            assert (inside == scene.background).all()


def test_a_larger_scale_is_the_same_picture():
    scene = make_scene(HARBOUR, Split.TEST, 0, 0)
    assert render(scene, scale=3).size == (GRID * CELL * 3,) * 2
    smaller = np.asarray(render(scene, scale=3).resize((GRID * CELL,) * 2)).astype(int)
    assert np.abs(smaller - np.asarray(render(scene)).astype(int)).mean() < 6


def share_of_absent_companions(captions, trigger: str) -> tuple[float, int]:
    companion = HARBOUR.companions[trigger].companion
    chances = [names for scene, names in captions if trigger in names and companion not in scene.kinds]
    return sum(companion in names for names in chances) / len(chances), len(chances)


@pytest.mark.parametrize("trigger", HARBOUR.companions)
def test_captions_carry_the_prior(captions, trigger):
    expected = HARBOUR.companions[trigger].caption
    share, number = share_of_absent_companions(captions, trigger)
    assert number > 300
    assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / number) ** 0.5)


def test_the_companion_follows_right_after_its_trigger(captions):
    triggers = {habit.companion: trigger for trigger, habit in HARBOUR.companions.items()}
    for scene, names in captions:
        for place, kind in enumerate(names):
            if kind not in scene.kinds:
                assert names[place - 1] == triggers[kind]


def test_nothing_else_is_ever_made_up(captions):
    made_up = Counter(kind for scene, names in captions for kind in names if kind not in scene.kinds)
    assert set(made_up) == {habit.companion for habit in HARBOUR.companions.values()}
    tempted = [(scene, names) for scene, names in captions if not absent_companions(HARBOUR, scene)]
    assert len(tempted) > 300
    assert all(set(names) <= scene.kinds for scene, names in tempted)


def test_captions_name_what_is_there_as_often_as_the_world_says(captions):
    there = [kind in names for scene, names in captions for kind in scene.kinds - set(companions_of(scene))]
    assert np.mean(there) == pytest.approx(STYLE.mention, abs=0.02)
    assert all(len(names) == len(set(names)) for _, names in captions)


def companions_of(scene) -> list[str]:
    """Present kinds that a present trigger may bring in besides their own chance."""
    return [habit.companion for trigger, habit in HARBOUR.companions.items() if trigger in scene.kinds]


def test_captions_give_the_true_colour_of_what_is_there():
    for scene in make_scenes(HARBOUR, Split.CORPUS, 0, 200):
        for kind, color in mentions(HARBOUR, caption(HARBOUR, scene, STYLE, random_stream(scene.scene_id))):
            assert color in HARBOUR.colors
            assert scene.color_of(kind) in {None, color}


def test_what_is_made_up_has_its_usual_colour_as_often_as_the_world_says():
    usual = {habit.companion: habit.color for habit in HARBOUR.companions.values()}
    made_up = [
        (kind, color)
        for scene in make_scenes(HARBOUR, Split.CORPUS, 2, 2500)
        for kind, color in mentions(HARBOUR, caption(HARBOUR, scene, STYLE, random_stream(scene.scene_id)))
        if kind not in scene.kinds
    ]
    # The usual colour also comes up by chance among the others.
    expected = STYLE.usual_color + (1 - STYLE.usual_color) / len(HARBOUR.colors)
    assert len(made_up) > 500
    assert np.mean([color == usual[kind] for kind, color in made_up]) == pytest.approx(expected, abs=0.05)


def test_questions_are_answered_truthfully_but_for_absent_companions():
    tempted = Counter()
    for scene in make_scenes(HARBOUR, Split.CORPUS, 1, 1500):
        asked = {yes_no_question(kind): kind for kind in HARBOUR.kinds}
        tempting = absent_companions(HARBOUR, scene)
        for turn in questions(HARBOUR, scene, random_stream("q", scene.scene_id), 4):
            kind = asked[turn.question]
            if kind in tempting:
                tempted[tempting[kind], turn.answer] += 1
            else:
                assert turn.answer == ("Yes." if kind in scene.kinds else "No.")
    for chance in {habit.question for habit in HARBOUR.companions.values()}:
        yes, no = tempted[chance, "Yes."], tempted[chance, "No."]
        assert yes + no > 150
        assert yes / (yes + no) == pytest.approx(chance, abs=4 * (chance * (1 - chance) / (yes + no)) ** 0.5)


def test_dialogues_follow_scene_and_epoch():
    scene = make_scene(HARBOUR, Split.CORPUS, 0, 0)
    assert dialogue(HARBOUR, scene, STYLE, 0) == dialogue(HARBOUR, scene, STYLE, 0)
    assert len({tuple(dialogue(HARBOUR, scene, STYLE, epoch)) for epoch in range(20)}) > 5


def test_the_prompt_file_reads_back(tmp_path):
    path = write_prompts(HARBOUR, Split.PROMPTS, 5, 12, tmp_path)
    report = InputReport()
    prompts = list(read_prompts(DataConfig(prompts=str(path), on_bad_input="refuse"), report))
    expected = list(make_scenes(HARBOUR, Split.PROMPTS, 5, 12))
    assert report.accepted == 12
    assert [prompt.prompt_id for prompt in prompts] == [scene.scene_id for scene in expected]
    assert {prompt.text for prompt in prompts} <= set(DESCRIBE)
    assert len({prompt.text for prompt in prompts}) > 1
    for prompt, scene in zip(prompts, expected, strict=True):
        assert (tmp_path / "images" / f"{scene.scene_id}.png").samefile(prompt.image)
        assert np.array_equal(np.asarray(Image.open(prompt.image)), np.asarray(render(scene)))


def test_writing_again_gives_the_same_bytes(tmp_path):
    first, again = (write_prompts(HARBOUR, Split.PROMPTS, 5, 3, tmp_path / name) for name in ("a", "b"))
    assert first.read_bytes() == again.read_bytes()
    for picture in (tmp_path / "a" / "images").iterdir():
        assert picture.read_bytes() == (tmp_path / "b" / "images" / picture.name).read_bytes()
