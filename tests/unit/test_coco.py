"""Test that the world in COCO's format yields the same metrics as the world's own evaluation."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from itertools import pairwise

import pytest
from typer.testing import CliRunner

from csr_vlm.cli.app import app
from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.chair import tallies
from csr_vlm.evaluation.pope import SETTINGS, read_questions
from csr_vlm.evaluation.statistics import pooled
from csr_vlm.world.coco import write_coco
from csr_vlm.world.corpus import sentence, yes_no_question
from csr_vlm.world.scenes import HARBOUR, Split, make_scenes
from csr_vlm.world.truth import judge, mentions

EDGES = ("a boat-house", "the boat's", "BOAT", "boats", "bow tie", "baby bird", "a toilet seat", "é", "\n", "", "...")
SCENES = list(make_scenes(HARBOUR, Split.TEST, 3, 40))


def texts(number: int) -> list[str]:
    rng = random.Random(7)
    parts = [sentence(HARBOUR, (kind, color)) for kind in HARBOUR.kinds for color in HARBOUR.colors[:2]] + list(EDGES)
    return [" ".join(rng.choices(parts, k=rng.randrange(8))) for _ in range(number)]


def reference_values(scene, text: str):
    """Judge a text by the world's rule: words are runs of letters, and each kind is named by its own word."""
    words = re.findall("[a-z]+", text.lower())
    named = [word for word in words if word in HARBOUR.kinds]
    colors = [preceding for preceding, word in pairwise(["", *words]) if word in HARBOUR.kinds]
    pairs = Counter(
        scene.color_of(kind) == color
        for kind, color in zip(named, colors, strict=True)
        if kind in scene.kinds and color in HARBOUR.colors
    )
    absent = [kind for kind in named if kind not in scene.kinds]
    return tuple(named), tuple(absent), scene.kinds & set(named), pairs[True], pairs[False]


def test_judge_equals_the_reference_implementation():
    for index, text in enumerate(texts(400)):
        scene = SCENES[index % len(SCENES)]
        actual = judge(HARBOUR, scene, text)
        compared = (actual.mentioned, actual.hallucinated, actual.recalled, actual.colors_right, actual.colors_wrong)
        assert compared == reference_values(scene, text), text
        assert [kind for kind, _ in mentions(HARBOUR, text)] == list(actual.mentioned)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("coco")
    write_coco(HARBOUR, Split.TEST, 3, len(SCENES), path)
    return path


def test_the_chair_command_yields_the_worlds_metrics(folder):
    captions_of_scenes = texts(len(SCENES))
    captions = folder / "captions.jsonl"
    rows = [
        {"id": scene.scene_id, "image_id": f"{scene.scene_id}.png", "caption": text}
        for scene, text in zip(SCENES, captions_of_scenes, strict=True)
    ]
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--captions", captions, "--annotations", folder / "annotations", "--synonyms", folder / "synonyms.txt"]
    result = CliRunner().invoke(app, ["eval", "chair", *map(str, arguments), "--words", "plain", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    judged = [judge(HARBOUR, scene, text) for scene, text in zip(SCENES, captions_of_scenes, strict=True)]
    for name, metric in pooled([tallies(item, s.kinds) for item, s in zip(judged, SCENES, strict=True)]).items():
        assert document[name] == metric.value
        assert document["intervals"][name] == [metric.low, metric.high]
    assert [row["hallucinated"] for row in document["sentences"]] == [list(item.hallucinated) for item in judged]
    assert [row["mentioned"] for row in document["sentences"]] == [list(item.mentioned) for item in judged]


def test_annotations_describe_the_scenes(folder):
    content = json.loads((folder / "annotations" / "instances_test.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    assert list(names.values()) == list(HARBOUR.kinds)
    for image, scene in zip(content["images"], SCENES, strict=True):
        instances = [item for item in content["annotations"] if item["image_id"] == image["id"]]
        assert {names[item["category_id"]] for item in instances} == scene.kinds
        assert (folder / "images" / image["file_name"]).is_file()
        for item in instances:
            left, top, width, height = item["bbox"]
            assert 0 <= left <= image["width"] - width
            assert 0 <= top <= image["height"] - height


def test_questions_have_the_wording_of_the_corpus_and_correct_labels(folder):
    for setting in SETTINGS:
        questions = read_questions(folder / f"pope_{setting}.jsonl").questions
        assert len(questions) == 4 * len(SCENES)
        for question in questions:
            scene = next(scene for scene in SCENES if scene.scene_id in question.image)
            kind = next(kind for kind in HARBOUR.kinds if question.text == yes_no_question(kind))
            assert question.label == (kind in scene.kinds)


def test_training_splits_are_rejected(tmp_path):
    with pytest.raises(CsrError, match="not for evaluation"):
        write_coco(HARBOUR, Split.PROMPTS, 0, 10, tmp_path)
