"""Check csr validate-scorer: labels, AUCs by hand, controls, the profile, the verdicts, the page and the errors."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from benchmarks.profiles import BASE, run_profile
from PIL import Image
from pydantic import BaseModel
from scipy.stats import norm

from csr_vlm.cli import validate_scorer as verb
from csr_vlm.config.load import load_config
from csr_vlm.config.schema import ClaimsConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Silent
from csr_vlm.core.records import Prompt
from csr_vlm.evaluation.auc_intervals import auc_difference, clustered_auc
from csr_vlm.evaluation.chair import ObjectReader
from csr_vlm.evaluation.labeled_captions import (
    LabeledCaptions,
    label_captions,
    read_any_captions,
    read_labels,
    size_of,
    suggested_kinds,
)
from csr_vlm.evaluation.objects import ObjectTable
from csr_vlm.evaluation.profile_measurement import measured_profile, profile_text
from csr_vlm.evaluation.reward_placement import place
from csr_vlm.evaluation.scorer_profile import Profile, read_profile
from csr_vlm.evaluation.scorer_validation import ScoredCaptions, compare_scorers, measure, score_captions
from csr_vlm.evaluation.scorer_verdict import decide
from csr_vlm.evaluation.sentence_kinds import kind_of, split_sentences
from csr_vlm.evaluation.words import word_rule
from csr_vlm.report.scorer_page import render_validation
from csr_vlm.scoring.scorer import ScorerGroup

KINDS = ("boat", "dog", "fork", "kite", "lamp", "table", "umbrella", "vase")
READER = ObjectReader(word_rule("plain"), ObjectTable.of([[kind] for kind in KINDS], of_coco=False))
CONFIG = load_config(None, ("preset=sentences",), base=BASE)
BY_CLAIM = load_config(None, (), base=BASE)


class Judge:
    """Give each (picture, text) a cosine that follows a rule; texts and pictures are known by what they name."""

    def __init__(self, name: str, truth: Mapping[str, frozenset[str]], gain: float, noise: float) -> None:
        self.name = name
        self._truth, self._gain, self._noise = truth, gain, noise

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        return [{self.name: self._cosine(Path(prompt.image).name, text)} for prompt, text in items]

    def forget(self) -> None:
        pass

    def _cosine(self, image: str, text: str) -> float:
        named = set(READER.read(text).objects)
        right = len(named & self._truth[image]) / len(named) if named else 0.0
        return 0.2 + self._gain * right + self._noise * random.Random(f"{self.name}{image}{text}").gauss(0, 1)


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def world(directory: Path, number: int, hallucinates: float = 0.3) -> tuple[LabeledCaptions, dict[str, frozenset[str]]]:
    """Label captions of a lead, three details and a mood about pictures of three objects each."""
    rng = random.Random(5)
    truth, captions = {}, []
    for index in range(number):
        name = f"p{index}.png"
        Image.new("RGB", (4, 4)).save(directory / name)
        objects = rng.sample(KINDS, 4)
        truth[name] = frozenset(objects)
        absent = [kind for kind in KINDS if kind not in objects]
        said = [rng.choice(absent) if rng.random() < hallucinates else kind for kind in objects[1:]]
        text = f"The image shows a {objects[0]}. " + " ".join(f"There is a {kind}." for kind in said)
        captions.append({"image": name, "response": f"{text} The mood is calm."})
    labels = [{"image": name, "objects": sorted(objects)} for name, objects in truth.items()]
    return (
        label_captions(
            read_labels(write_rows(directory / "labels.jsonl", labels)),
            read_any_captions(write_rows(directory / "captions.jsonl", captions)),
            READER,
            [directory],
            ClaimsConfig(),
        ),
        truth,
    )


def scored(captions: LabeledCaptions, *judges: Judge) -> ScoredCaptions:
    return score_captions(captions, ScorerGroup(judges), 16, Silent())


# Labels ----------------------------------------------------------------------------------------------------------


def test_sentences_and_claims_are_labeled(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    labels = write_rows(
        tmp_path / "labels.jsonl",
        [
            {"image": "a.png", "objects": ["fork", "table"], "sizes": ["small", "large"]},
            {"image": "b.png", "objects": ["dog"], "boxes": [[0, 0, 10, 10]], "width": 100, "height": 100},
        ],
    )
    text = "A fork is here. A lamp stands next to a table. In the background, there is a vase.\n- A fork\nAll is calm."
    captions = write_rows(tmp_path / "c.jsonl", [{"image": "a.png", "caption": text}, {"image": "b.png", "text": ""}])
    found = label_captions(read_labels(labels), read_any_captions(captions), READER, [tmp_path], ClaimsConfig())
    assert [(one.kind, one.claims, one.truth) for one in found.sentences] == [
        ("lead", ("fork",), "grounded"),
        ("relation", ("lamp", "table"), "random"),
        ("background", ("vase",), "random"),
        ("item", ("fork",), "grounded"),
        ("mood", (), None),
    ]
    assert [(one.text, one.kind, one.truth, one.size) for one in found.claims] == [
        ("a photo of a fork", "lead", "grounded", "small"),
        ("a photo of a lamp", "relation", "random", None),
        ("a photo of a table", "relation", "grounded", "large"),
        ("a photo of a vase", "background", "random", None),
    ]
    assert found.pictures[1].sizes == {"dog": "medium"}
    assert not found.habits_known, "two pictures are too few to count what occurs together"


def test_sizes_are_those_of_coco_on_a_picture_of_640_by_480():
    whole = 640 * 480
    bounds = [31**2, 33**2, 95**2, 97**2]
    assert [size_of(area / whole) for area in bounds] == ["small", "medium", "medium", "large"]


def test_a_coco_directory_gives_objects_and_sizes(tmp_path):
    content = {
        "images": [{"id": 7, "file_name": "a.png", "width": 100, "height": 100}],
        "categories": [{"id": 1, "name": "fork"}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "area": 20.0},
            {"image_id": 7, "category_id": 1, "area": 900.0},
        ],
    }
    (tmp_path / "instances_val.json").write_text(json.dumps(content))
    assert read_labels(tmp_path).areas == {7: (0.002, 0.09)}


def test_habits_are_what_other_pictures_with_the_same_objects_have():
    captioned = [(frozenset({"boat"}), frozenset({"dog"}))]
    others = [frozenset({"boat", "fish"}), frozenset({"boat", "fish", "crab"}), frozenset({"lamp", "dog"})]
    assert suggested_kinds(captioned, others) == [frozenset({"fish", "crab"})], "its own captions do not count"


def test_kinds_of_sentences():
    assert split_sentences("Dr. Low sits. A dog runs!\n1. A cup\n2. A fork") == [
        "Dr. Low sits.",
        "A dog runs!",
        "1. A cup",
        "2. A fork",
    ]
    assert kind_of("There is a vase on it.", 2, 1) == "relation"
    assert kind_of("There is a vase on the left.", 2, 1) == "detail"


# AUC ---------------------------------------------------------------------------------------------------------------


def test_auc_by_hand():
    # True 3 and 1, false 2 and 0: of four comparisons 3 > 2, 3 > 0, 1 > 0 are right, 1 > 2 is wrong.
    found = clustered_auc([3.0, 1.0, 2.0, 0.0], [True, True, False, False], [0, 1, 2, 3])
    assert found is not None
    assert (found.value, found.num_true, found.num_false) == (0.75, 2, 2)
    # V = 1, 1/2 | 1/2, 1: d = (1/8, -1/8, -1/8, 1/8), variance 4/3 * 4/64, half width of log-odds t(1) sd / (3/16)
    half = 12.706 * np.sqrt(4 / 3 * 4 / 64) / (3 / 16)
    odds = np.log(3)
    assert found.low == pytest.approx(1 / (1 + np.exp(half - odds)), rel=1e-2, abs=1e-9)
    assert clustered_auc([1.0, 2.0], [True, True], [0, 1]) is None


def test_a_perfect_auc_has_an_interval():
    found = clustered_auc([2.0] * 20 + [1.0] * 20, [True] * 20 + [False] * 20, list(range(40)))
    assert found is not None
    assert found.value == found.high == 1.0
    assert 0.8 < found.low < 0.95


def test_intervals_cover_the_auc_of_texts_that_depend_on_each_other():
    rng, hits, per_picture = np.random.default_rng(0), 0, 5
    expected = norm.cdf(1.2 / np.sqrt(2))
    pictures = np.repeat(np.arange(60), per_picture)
    for _ in range(1000):
        truth = rng.random(len(pictures)) > 0.2
        scores = np.sqrt(0.4) * rng.normal(size=60)[pictures] + np.sqrt(0.6) * rng.normal(size=len(pictures))
        found = clustered_auc(scores + 1.2 * truth, truth, pictures)
        assert found is not None
        hits += found.low <= expected <= found.high
    assert hits >= 0.93 * 1000


def test_the_order_of_texts_does_not_matter():
    scores, truth, pictures = [0.3, 0.1, 0.2, 0.5, 0.0], [True, False, True, True, False], [0, 0, 1, 1, 1]
    order = [4, 2, 0, 1, 3]
    shuffled = [[values[i] for i in order] for values in (scores, truth, pictures)]
    assert clustered_auc(*shuffled) == clustered_auc(scores, truth, pictures)


def test_a_scorer_does_not_differ_from_itself():
    scores, truth = [0.3, 0.1, 0.2, 0.5], [True, False, True, False]
    found = auc_difference(scores, scores, truth, [0, 1, 2, 3])
    assert found is not None
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


# Controls ----------------------------------------------------------------------------------------------------------


def test_contrast_by_hand(tmp_path):
    captions, truth = world(tmp_path, 3)
    found = scored(captions, Judge("clip", truth, 0.5, 0.0))
    for claim, value in zip(captions.claims, found.contrasts("clip", "claims"), strict=True):
        shown = [claim.claims[0] in truth[f"p{index}.png"] for index in range(3)]
        own = shown.pop(claim.picture)
        assert value == pytest.approx(0.5 * (own - sum(shown) / 2))


def test_a_perfect_judge_noise_and_flipped_truth(tmp_path):
    captions, truth = world(tmp_path, 120)
    found = scored(
        captions,
        Judge("perfect", truth, 0.5, 0.001),
        Judge("noise", truth, 0.0, 0.05),
        Judge("flipped", truth, -0.5, 0.001),
    )
    aucs = {name: measure(found, name).claims[0].auc for name in found.scorers}
    assert aucs["perfect"].value > 0.999
    assert aucs["flipped"].value < 0.001
    assert aucs["noise"].low < 0.5 < aucs["noise"].high
    placed = {name: place(found, name, CONFIG.method) for name in found.scorers}
    own = placed["perfect"].margins[0]
    assert own.right > 100
    assert own.wrong == own.end_over_true == 0
    assert placed["flipped"].margins[0].wrong > 10 * max(placed["flipped"].margins[0].right, 1)
    verdicts = {
        name: decide(measure(found, name), placed[name], [], len(captions.pictures), CONFIG) for name in found.scorers
    }
    assert {name: verdict.level for name, verdict in verdicts.items()} == {
        "perfect": "good enough",
        "noise": "useless",
        "flipped": "useless",
    }
    assert verdicts["perfect"].advice == ()
    assert "Do not train" in verdicts["noise"].advice[0]


def test_a_perfect_judge_and_noise_by_claim(tmp_path):
    captions, truth = world(tmp_path, 120)
    found = scored(
        captions,
        Judge("perfect", truth, 0.5, 0.001),
        Judge("noise", truth, 0.0, 0.05),
    )
    placed = {name: place(found, name, BY_CLAIM.method) for name in found.scorers}
    own = placed["perfect"].margins[0]
    assert own.right > 20
    assert own.wrong == own.end_over_true == 0
    assert placed["perfect"].zero_line > 0
    assert placed["perfect"].questions["yes_wrong"] + placed["perfect"].questions["no_wrong"] == 0
    assert placed["perfect"].questions["yes_right"] > 20
    assert placed["noise"].margins[0].wrong + placed["noise"].margins[0].end_over_true <= 3


def test_two_scorers_with_separate_errors_are_better_together(tmp_path):
    captions, truth = world(tmp_path, 150)
    found = scored(captions, Judge("one", truth, 0.1, 0.08), Judge("two", truth, 0.1, 0.08))
    pair = compare_scorers(found, "one", "two")
    assert abs(pair.shared_claim_error) < 0.25
    assert pair.gain_by_claim.low > 0
    verdict = decide(measure(found, "one"), place(found, "one", CONFIG.method), [pair], 150, CONFIG)
    assert any("scorer.use=one+two" in line for line in verdict.advice)


def test_few_pictures_give_intervals_and_no_verdict(tmp_path):
    captions, truth = world(tmp_path, 20)
    found = scored(captions, Judge("clip", truth, 0.5, 0.01))
    verdict = decide(measure(found, "clip"), place(found, "clip", CONFIG.method), [], 20, CONFIG)
    assert verdict.level == "not decided"
    assert "20 pictures are too few" in verdict.summary
    assert re.search(r"AUC 1\.00 \(0\.\d\d to 1\.00\), no verdict", verdict.summary)


def test_captions_without_a_false_object_give_no_verdict_and_no_profile(tmp_path):
    captions, truth = world(tmp_path, 60, hallucinates=0.0)
    found = scored(captions, Judge("clip", truth, 0.5, 0.01))
    verdict = decide(measure(found, "clip"), place(found, "clip", CONFIG.method), [], 60, CONFIG)
    assert verdict.level == "not decided"
    assert "name no object that is not in its picture" in verdict.summary
    assert measured_profile(found, "x", "x", ["clip"], None) is None


def test_a_picture_needs_another_one(tmp_path):
    captions, truth = world(tmp_path, 1)
    with pytest.raises(CsrError, match="at least two pictures"):
        scored(captions, Judge("clip", truth, 0.5, 0.01))


# Profile and page --------------------------------------------------------------------------------------------------


def test_the_profile_runs_in_the_profile_benchmark(tmp_path):
    captions, truth = world(tmp_path, 150)
    found = scored(captions, Judge("one", truth, 0.3, 0.02), Judge("two", truth, 0.1, 0.05))
    profile = measured_profile(found, "mine", "a test", ["one", "two"], 0.1)
    assert profile is not None
    path = tmp_path / "mine.yaml"
    path.write_text(profile_text(profile))
    read = read_profile(path)
    claims = [
        v for c, v in zip(captions.claims, found.contrasts("one", "claims"), strict=True) if c.truth == "grounded"
    ]
    assert read.judge.claim.grounded.mean == pytest.approx(np.mean(claims), abs=1e-4)
    assert read.judge.claim.grounded.sd == pytest.approx(np.std(claims, ddof=1), abs=1e-4)
    assert read.judge.spread == pytest.approx(0.02, rel=0.2)
    assert read.policy.num_sentences == (5, 5)
    assert read.policy.kinds == {"detail": 0.75, "mood": 0.25}
    assert read.second is not None
    assert read.second.claim.grounded.mean < read.judge.claim.grounded.mean
    outcome = run_profile(read, load_config(None, (), base=BASE), 30)
    assert outcome.right > outcome.wrong


def test_the_page_is_self_contained_and_escapes_names(tmp_path):
    captions, truth = world(tmp_path, 60)
    found = scored(captions, Judge("a-b", truth, 0.2, 0.05))
    validation = verb._validate(found, CONFIG, {"scorers": {"a-b": "<script>alert(1)</script>"}})
    page = render_validation(validation)
    assert "<script>alert" not in page
    assert "//" not in re.sub(r'xmlns="[^"]*"', "", page), "it loads nothing"
    assert page.count("<svg") == 2
    assert "zero line" in page
    written = verb._write(validation, tmp_path / "out")
    drawings = [path for path in written if path.suffix == ".svg"]
    assert len(drawings) == 2
    for path in drawings:
        assert ET.parse(path).getroot().tag.endswith("svg")
    rows = [json.loads(line) for line in (tmp_path / "out" / "texts.jsonl").read_text().splitlines()]
    assert len(rows) == len(captions.sentences) + len(captions.claims)
    assert json.loads((tmp_path / "out" / "validation.json").read_text())["verdicts"][0]["scorer"] == "a-b"


# Errors ------------------------------------------------------------------------------------------------------------


def _label(tmp_path: Path, labels: Sequence[Mapping[str, object]], captions: Sequence[Mapping[str, object]]) -> None:
    label_captions(
        read_labels(write_rows(tmp_path / "labels.jsonl", labels)),
        read_any_captions(write_rows(tmp_path / "captions.jsonl", captions)),
        READER,
        [tmp_path],
        ClaimsConfig(),
    )


@pytest.mark.parametrize(
    ("labels", "captions", "message"),
    [
        ([{"image": "a.png", "objects": ["fork"]}], [{"image": "b.png", "caption": "x"}], "no caption is about"),
        ([{"image": "a.png", "objects": ["spaceship"]}], [{"image": "a.png", "caption": "x"}], "lacks categories"),
        (
            [{"image": "c.png", "objects": ["fork"]}],
            [{"image": "c.png", "caption": "x"}],
            "1 of 1 pictures are missing",
        ),
        ([{"image": "a.png"}], [{"image": "a.png", "caption": "x"}], "row 1: image or objects is missing"),
        ([{"image": "a.png", "objects": ["fork"]}], [{"image": "a.png"}], "row 1: image or caption is missing"),
        ([{"image": "a.png", "objects": ["fork"], "sizes": ["tiny"]}], [], "sizes or boxes do not fit"),
        ([{"image": "a.png", "objects": ["fork"], "boxes": [[0, 0, 1, 1]]}], [], "sizes or boxes do not fit"),
        ([], [], "contains no labels"),
        ([{"image": "a.png", "objects": ["fork"]}], [], "contains no captions"),
    ],
)
def test_errors_say_what_to_do(tmp_path, labels, captions, message):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(CsrError, match=message) as raised:
        _label(tmp_path, labels, captions)
    assert raised.value.hint


def test_a_synonym_file_of_coco_has_the_special_cases_of_chair(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    labels = write_rows(tmp_path / "labels.jsonl", [{"image": "a.png", "objects": ["train"]}])
    captions = write_rows(tmp_path / "c.jsonl", [{"image": "a.png", "caption": "A dog is near the train tracks."}])
    lines = "\n".join(", ".join(names) for names in [("train",), ("dog",)])
    own, coco = tmp_path / "own.txt", tmp_path / "coco.txt"
    own.write_text(lines)
    coco.write_text("\n".join(sorted(set(ObjectTable.coco().objects.values()))))
    claims = [
        [claim.claims for claim in verb._read(labels, captions, tmp_path, "pattern", path, None, ClaimsConfig()).claims]
        for path in (own, coco)
    ]
    assert claims == [[("dog",), ("train",)], [("dog",)]]


def test_scorers_are_named_on_the_command_line():
    config = verb._scorers(["b=x/clip", "y/siglip"], trust_import=False)
    assert [(one.name, one.path) for one in (config, *config.extra)] == [("b", "x/clip"), ("scorer2", "y/siglip")]
    with pytest.raises(CsrError, match="distinct"):
        verb._scorers(["a=x", "a=y"], trust_import=False)


# Documentation -----------------------------------------------------------------------------------------------------


def fields(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """Yield the dotted names of a profile's fields; ``second`` repeats ``judge``."""
    for name, field in model.model_fields.items():
        sections = [kind for kind in (field.annotation, *get_args(field.annotation)) if is_section(kind)]
        if sections and prefix + name != "second":
            yield from fields(sections[0], f"{prefix}{name}.")
        else:
            yield prefix + name


def is_section(kind: object) -> bool:
    return isinstance(kind, type) and kind.__name__ in {
        "PictureProfile", "PolicyProfile", "JudgeProfile", "AnswerProfile"
    }  # fmt: skip


def test_the_page_explains_every_field_of_a_profile():
    page = (Path(__file__).parents[2] / "docs" / "validate-scorer.md").read_text(encoding="utf-8")
    names = list(fields(Profile, ""))
    assert {"policy.habit", "judge.spread", "second", "answers.with_picture"} <= set(names)
    assert [name for name in names if f"`{name}`" not in page] == []
