"""Test the world's scenes, their images, captions and prompt files."""

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
    """Return (scene, kinds that its caption names, in order) for many corpus scenes."""
    scenes_and_kinds = []
    for scene in make_scenes(HARBOUR, Split.CORPUS, 0, NUM_SCENES):
        text = caption(HARBOUR, scene, STYLE, random_stream("test", scene.scene_id))
        scenes_and_kinds.append((scene, [kind for kind, _ in mentions(HARBOUR, text)]))
    return scenes_and_kinds


def test_equal_keys_yield_equal_scenes_and_pixels():
    first, again = (make_scene(HARBOUR, Split.TEST, 1, 17) for _ in range(2))
    assert first == again
    assert render(first).tobytes() == render(again).tobytes()


def test_a_scene_depends_on_split_seed_and_index():
    base = make_scene(HARBOUR, Split.TEST, 1, 17)
    variants = [
        make_scene(HARBOUR, Split.DEVELOPMENT, 1, 17),
        make_scene(HARBOUR, Split.TEST, 2, 17),
        make_scene(HARBOUR, Split.TEST, 1, 18),
    ]
    drawn = {(scene.objects, scene.background) for scene in (base, *variants)}
    assert len(drawn) == 4


def test_splits_are_disjoint():
    drawn = {split: {render(s).tobytes() for s in make_scenes(HARBOUR, split, 0, 60)} for split in Split}
    assert all(len(pictures) == 60 for pictures in drawn.values())
    assert all(drawn[a].isdisjoint(drawn[b]) for a, b in combinations(Split, 2))


def test_scenes_can_be_generated_from_any_index():
    whole = list(make_scenes(HARBOUR, Split.TEST, 0, 10))
    assert list(make_scenes(HARBOUR, Split.TEST, 0, 4, start=6)) == whole[6:]


@pytest.mark.parametrize("split", Split)
def test_ids_round_trip(split):
    for scene in make_scenes(HARBOUR, split, 3, 5):
        assert parse_scene_id(HARBOUR, scene.scene_id) == scene
        assert scene_of(scene.scene_id) == (HARBOUR, scene)


@pytest.mark.parametrize("name", ["", "photo-17", "desert-test-0-000001", "harbour-exam-0-000001", "harbour-test-0-x"])
def test_invalid_ids_are_rejected(name):
    with pytest.raises(ValueError):
        parse_scene_id(HARBOUR, name)
    assert scene_of(name) is None


def test_scenes_satisfy_the_constraints_of_the_world():
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
def test_every_kind_and_color_can_be_drawn(world):
    assert set(world.kinds) <= set(SHAPES)
    assert len(world.kinds) == len(set(world.kinds)) == 16
    assert set(world.colors) <= set(RGB)
    assert set(world.companions) <= set(world.kinds)
    assert {prior.companion for prior in world.companions.values()} <= set(world.kinds)
    assert {prior.color for prior in world.companions.values()} <= set(world.colors)


def test_the_worlds_share_no_kind():
    assert not set(HARBOUR.kinds) & set(MARKET.kinds)
    assert set(SHAPES) == {*HARBOUR.kinds, *MARKET.kinds}


def test_some_market_sentences_name_two_objects():
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
    assert min(np.abs(a - b).mean() for a, b in combinations(shapes, 2)) > 0.05, "by a clear margin"


def test_objects_are_drawn_in_their_cell_and_color():
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


def test_a_larger_scale_draws_the_same_image():
    scene = make_scene(HARBOUR, Split.TEST, 0, 0)
    assert render(scene, scale=3).size == (GRID * CELL * 3,) * 2
    smaller = np.asarray(render(scene, scale=3).resize((GRID * CELL,) * 2)).astype(int)
    assert np.abs(smaller - np.asarray(render(scene)).astype(int)).mean() < 6


def share_of_absent_companions(captions, trigger: str) -> tuple[float, int]:
    companion = HARBOUR.companions[trigger].companion
    candidates = [kinds for scene, kinds in captions if trigger in kinds and companion not in scene.kinds]
    return sum(companion in kinds for kinds in candidates) / len(candidates), len(candidates)


@pytest.mark.parametrize("trigger", HARBOUR.companions)
def test_captions_name_absent_companions_with_the_configured_probability(captions, trigger):
    expected = HARBOUR.companions[trigger].caption
    share, number = share_of_absent_companions(captions, trigger)
    assert number > 300
    assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / number) ** 0.5)


def test_a_hallucinated_companion_directly_follows_its_trigger(captions):
    triggers = {prior.companion: trigger for trigger, prior in HARBOUR.companions.items()}
    for scene, kinds in captions:
        for index, kind in enumerate(kinds):
            if kind not in scene.kinds:
                assert kinds[index - 1] == triggers[kind]


def test_captions_hallucinate_only_companions(captions):
    hallucinated = {kind for scene, kinds in captions for kind in kinds if kind not in scene.kinds}
    assert hallucinated == {prior.companion for prior in HARBOUR.companions.values()}
    without_companions = [(scene, kinds) for scene, kinds in captions if not absent_companions(HARBOUR, scene)]
    assert len(without_companions) > 300
    assert all(set(kinds) <= scene.kinds for scene, kinds in without_companions)


def test_captions_name_present_objects_with_the_configured_probability(captions):
    mentioned = [kind in kinds for scene, kinds in captions for kind in scene.kinds - set(companions_of(scene))]
    assert np.mean(mentioned) == pytest.approx(STYLE.mention, abs=0.02)
    assert all(len(kinds) == len(set(kinds)) for _, kinds in captions)


def companions_of(scene) -> list[str]:
    """List the companions of present triggers, which captions name more often."""
    return [prior.companion for trigger, prior in HARBOUR.companions.items() if trigger in scene.kinds]


def test_captions_give_the_correct_color_of_present_objects():
    for scene in make_scenes(HARBOUR, Split.CORPUS, 0, 200):
        for kind, color in mentions(HARBOUR, caption(HARBOUR, scene, STYLE, random_stream(scene.scene_id))):
            assert color in HARBOUR.colors
            assert scene.color_of(kind) in {None, color}


def test_hallucinated_companions_have_their_usual_color_with_the_configured_probability():
    usual = {prior.companion: prior.color for prior in HARBOUR.companions.values()}
    hallucinated = [
        (kind, color)
        for scene in make_scenes(HARBOUR, Split.CORPUS, 2, 2500)
        for kind, color in mentions(HARBOUR, caption(HARBOUR, scene, STYLE, random_stream(scene.scene_id)))
        if kind not in scene.kinds
    ]
    # A random color may be the usual one too.
    expected = STYLE.usual_color + (1 - STYLE.usual_color) / len(HARBOUR.colors)
    assert len(hallucinated) > 500
    assert np.mean([color == usual[kind] for kind, color in hallucinated]) == pytest.approx(expected, abs=0.05)


def test_only_questions_about_absent_companions_are_answered_wrongly():
    num_answers = Counter()
    for scene in make_scenes(HARBOUR, Split.CORPUS, 1, 1500):
        kind_of = {yes_no_question(kind): kind for kind in HARBOUR.kinds}
        companions = absent_companions(HARBOUR, scene)
        for turn in questions(HARBOUR, scene, random_stream("q", scene.scene_id), 4):
            kind = kind_of[turn.question]
            if kind in companions:
                num_answers[companions[kind], turn.answer] += 1
            else:
                assert turn.answer == ("Yes." if kind in scene.kinds else "No.")
    for probability in {prior.question for prior in HARBOUR.companions.values()}:
        yes, no = num_answers[probability, "Yes."], num_answers[probability, "No."]
        assert yes + no > 150
        tolerance = 4 * (probability * (1 - probability) / (yes + no)) ** 0.5
        assert yes / (yes + no) == pytest.approx(probability, abs=tolerance)


def test_dialogues_depend_on_scene_and_epoch():
    scene = make_scene(HARBOUR, Split.CORPUS, 0, 0)
    assert dialogue(HARBOUR, scene, STYLE, 0) == dialogue(HARBOUR, scene, STYLE, 0)
    assert len({tuple(dialogue(HARBOUR, scene, STYLE, epoch)) for epoch in range(20)}) > 5


def test_the_prompt_file_can_be_read(tmp_path):
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


def test_writing_again_yields_the_same_bytes(tmp_path):
    first, again = (write_prompts(HARBOUR, Split.PROMPTS, 5, 3, tmp_path / name) for name in ("a", "b"))
    assert first.read_bytes() == again.read_bytes()
    for picture in (tmp_path / "a" / "images").iterdir():
        assert picture.read_bytes() == (tmp_path / "b" / "images" / picture.name).read_bytes()
