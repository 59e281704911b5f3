"""Check csr validate-scorer on the embedded worlds, through their COCO exports."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.profiles import BASE, run_profile
from typer.testing import CliRunner

from csr_vlm.cli.app import app
from csr_vlm.config.load import load_config
from csr_vlm.evaluation.scorer_profile import read_profile
from csr_vlm.world.coco import write_coco
from csr_vlm.world.corpus import sentence
from csr_vlm.world.demo import assets, assets_of
from csr_vlm.world.prose_scenes import PROSE, ProseScene
from csr_vlm.world.scenes import HARBOUR, Split, World, make_scenes

SEED, NUM_SCENES = 10_500, 80


def harbour_caption(scene, rng: random.Random) -> str:
    """Describe a scene by the world's template, with one absent kind in two of three captions."""
    kinds = [item.kind for item in scene.objects]
    absent = rng.choice([kind for kind in HARBOUR.kinds if kind not in kinds])
    said = [*kinds, *([absent] if rng.random() < 0.67 else [])]
    colors = {item.kind: item.color for item in scene.objects}
    return " ".join(sentence(HARBOUR, (kind, colors.get(kind, HARBOUR.colors[0]))) for kind in said)


def prose_caption(scene, rng: random.Random) -> str:
    """Describe a scene in short sentences, each about one kind, one in four absent."""
    assert isinstance(scene, ProseScene)
    kinds = sorted(scene.kinds)
    absent = [kind for kind in PROSE.kinds if kind not in kinds]
    said = [kinds[0], *(rng.choice(absent) if rng.random() < 0.25 else kind for kind in kinds[1:])]
    return " ".join(f"There is a {kind} in the scene." for kind in said) + " The overall atmosphere is calm."


def export(world: World, directory: Path) -> Iterator[tuple[str, object]]:
    write_coco(world, Split.DEVELOPMENT, SEED, NUM_SCENES, directory)
    for scene in make_scenes(world, Split.DEVELOPMENT, SEED, NUM_SCENES):
        yield f"{scene.scene_id}.png", scene


def run(*arguments: str) -> dict:
    result = CliRunner().invoke(app, ["validate-scorer", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def captioned(world: World, directory: Path, caption) -> Path:
    rng = random.Random(1)
    path = directory / "captions.jsonl"
    rows = [{"image": name, "caption": caption(scene, rng)} for name, scene in export(world, directory)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_harbour_judge_is_good(tmp_path):
    captions = captioned(HARBOUR, tmp_path, harbour_caption)
    out = tmp_path / "out"
    found = run(
        "--annotations", str(tmp_path / "annotations"), "--captions", str(captions), "--words", "plain",
        "--synonyms", str(tmp_path / "synonyms.txt"), "--scorer", str(assets() / "clip"), "--device", "cpu",
        "--out", str(out), "method.claims.caption=There is {a} {0}.",
    )  # fmt: skip
    assert found["verdicts"][0]["by_sentence"] == "good enough"
    assert found["scorers"][0]["sentences"][0]["auc"]["value"] > 0.98
    placed = found["placements"][0]
    assert placed["true_below_zero"] < 0.1
    assert placed["false_above_zero"] < 0.1
    assert {Path(path).name for path in found["written"]} == {path.name for path in out.iterdir()}
    outcome = run_profile(read_profile(out / "profile.yaml"), load_config(None, (), base=BASE), 20)
    assert outcome.right > outcome.wrong


@pytest.mark.skipif(not assets_of(PROSE).is_dir(), reason="the world prose has no shipped models")
def test_the_judges_of_prose_are_fallible_and_share_errors_partly(tmp_path):
    captions = captioned(PROSE, tmp_path, prose_caption)
    models = assets_of(PROSE)
    found = run(
        "--annotations", str(tmp_path / "annotations"), "--captions", str(captions), "--device", "cpu",
        "--synonyms", str(tmp_path / "synonyms.txt"), "--scorer", f"a={models / 'clip'}",
        "--scorer", f"b={models / 'clip_b'}", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    by_name = {one["name"]: one for one in found["scorers"]}
    assert set(by_name) == {"a", "b", "a+b"}
    claims = {name: one["claims"][0]["auc"] for name, one in by_name.items()}
    assert 0.7 < claims["a"]["value"] < 0.97
    assert 0 < found["pairs"][0]["shared_claim_error"] < 0.95
    sizes = {one["group"] for one in by_name["a"]["claims"]}
    assert {"size: medium", "size: large"} <= sizes
    profile = read_profile(tmp_path / "out" / "profile.yaml")
    assert profile.second is not None
    assert profile.judge.claim.grounded.mean > profile.judge.claim.random.mean


def test_flipped_truth_flips_the_auc(tmp_path):
    captions = captioned(HARBOUR, tmp_path, harbour_caption)
    arguments = (
        "--annotations", str(tmp_path / "annotations"), "--captions", str(captions), "--words", "plain",
        "--synonyms", str(tmp_path / "synonyms.txt"), "--scorer", str(assets() / "clip"), "--device", "cpu",
        "--out", str(tmp_path / "out"),
    )  # fmt: skip
    straight = run(*arguments)
    path = tmp_path / "annotations" / "instances_development.json"
    content = json.loads(path.read_text())
    shown: dict[int, set[int]] = {image["id"]: set() for image in content["images"]}
    for item in content["annotations"]:
        shown[item["image_id"]].add(item["category_id"])
    every = {category["id"] for category in content["categories"]}
    content["annotations"] = [
        {"image_id": image, "category_id": kind} for image, kinds in shown.items() for kind in every - kinds
    ]
    path.write_text(json.dumps(content))
    flipped = run(*arguments)
    assert flipped["verdicts"][0]["level"] == "useless"
    for of in ("sentences", "claims"):
        before, after = (found["scorers"][0][of][0]["auc"]["value"] for found in (straight, flipped))
        assert before > 0.7
        assert after == pytest.approx(1 - before)
