"""Test the embedded world: the quality of its shipped models, and building them from a seed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from csr_vlm.config.schema import ModelConfig, ScorerConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.generation.transformers_engine import TransformersEngine
from csr_vlm.models.loading import load_policy
from csr_vlm.models.policy import Policy
from csr_vlm.scoring.registry import load_scorer
from csr_vlm.scoring.scorer import ScorerGroup
from csr_vlm.world.base_models import EOS, SPECIAL, Sizes
from csr_vlm.world.build import (
    LEARN_TO_SEE,
    PICK_UP_HABITS,
    BuildPlan,
    build,
    dialogue_ids,
    file_hashes,
    picture_text,
    pixels,
)
from csr_vlm.world.corpus import Turn, sentence
from csr_vlm.world.demo import assets, verify_assets
from csr_vlm.world.scene_evaluation import evaluate, evaluate_scorer
from csr_vlm.world.scenes import HARBOUR, Split, make_scenes

SMALL = BuildPlan(
    scorer_steps=12,
    scorer_batch=8,
    policy_phases=tuple(replace(phase, steps=6) for phase in (LEARN_TO_SEE, PICK_UP_HABITS)),
    policy_batch=4,
    sizes=Sizes(
        vision_width=32, vision_layers=2, text_width=32, text_layers=1, language_width=32, language_layers=1, heads=2
    ),
)


def test_the_shipped_weights_are_small_and_match_their_log() -> None:
    verify_assets()
    log = json.loads((assets() / "build.json").read_text())
    assert log["world"] == "harbour"
    assert log["policy"][0]["loss"][0][1] > log["policy"][0]["loss"][-1][1]
    own = [*assets().glob("clip/*"), *assets().glob("llava/*")]
    assert 2**20 < sum(path.stat().st_size for path in own) < 10 * 2**20
    for path in assets().glob("*/*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} <= {torch.float16, torch.int64}


@pytest.mark.slow
def test_the_base_model_recognizes_objects_and_hallucinates_companions(policy: Policy, scorer: ScorerGroup) -> None:
    evaluation = evaluate(HARBOUR, TransformersEngine(policy), scorer, split=Split.TEST, seed=1, num_scenes=500)
    value = {name: metric["value"] for name, metric in evaluation["metrics"].items()}
    assert 0.40 <= value["chair_s"] <= 0.60
    assert 0.12 <= value["chair_i"] <= 0.20
    assert value["recall"] >= 0.98
    assert value["attributes_right"] >= 0.97
    assert value["yes_no_present"] >= 0.9
    assert value["yes_no_absent"] >= 0.9
    assert value["yes_no_companion"] < value["yes_no_absent"] - 0.05


def test_the_scorer_separates_true_from_false_sentences(scorer: ScorerGroup) -> None:
    aucs = evaluate_scorer(HARBOUR, scorer, split=Split.TEST, seed=1, num_scenes=200)
    assert aucs["auc_absent"] >= 0.97
    assert aucs["auc_attribute"] >= 0.95


def test_every_word_of_a_sentence_changes_its_embedding(scorer: ScorerGroup, prompts) -> None:
    words = sentence(HARBOUR, ("boat", "red")).rstrip(".").split()
    changed_texts = [" ".join([*words[:index], "fish", *words[index + 1 :]]) + "." for index in range(len(words))]
    texts = [sentence(HARBOUR, ("boat", "red")), *changed_texts]
    cosines = [row["clip"] for row in scorer.score([(prompts[0], text) for text in texts])]
    assert all(abs(changed - cosines[0]) > 1e-3 for changed in cosines[1:])
    assert SPECIAL.index(EOS) != 2


def test_evaluation_rejects_training_splits(policy: Policy) -> None:
    for split in (Split.CORPUS, Split.PROMPTS):
        with pytest.raises(CsrError, match="not for evaluation"):
            evaluate(HARBOUR, TransformersEngine(policy), None, split=split, seed=0, num_scenes=1)


def test_training_uses_the_pixel_values_of_the_processor(policy: Policy, prompts) -> None:
    scenes = list(make_scenes(HARBOUR, Split.DEVELOPMENT, 0, 12))
    for row, prompt in zip(pixels(scenes), prompts, strict=True):
        assert torch.allclose(policy.encode(prompt).per_image["pixel_values"][0], row, atol=1e-5)


def test_training_uses_the_token_ids_of_generation(policy: Policy, prompts) -> None:
    picture = picture_text(policy.processor)
    assert picture == "<image>" * 36
    ids, labels = dialogue_ids(policy.processor, [Turn(prompts[0].text, "There is a red boat.")], picture)
    prompt_ids = policy.encode(prompts[0]).input_ids.tolist()
    assert ids[: len(prompt_ids)] == prompt_ids
    answer = [label for label in labels if label != -100]
    assert policy.tokenizer.decode(answer) == " There is a red boat.</s>"
    assert ids[len(prompt_ids) :] == answer


def test_building_from_a_seed_is_reproducible_and_yields_loadable_models(tmp_path: Path) -> None:
    log = build(HARBOUR, tmp_path / "a", SMALL)
    build(HARBOUR, tmp_path / "b", SMALL)
    other = build(HARBOUR, tmp_path / "c", replace(SMALL, seed=1))
    assert file_hashes(tmp_path / "a") == file_hashes(tmp_path / "b") == log["sha256"]
    assert other["sha256"] != log["sha256"]
    assert json.loads((tmp_path / "a" / "build.json").read_text())["plan"]["scorer_steps"] == 12
    policy = load_policy(ModelConfig(path=str(tmp_path / "a" / "llava"), device="cpu"), None)
    scorer = load_scorer(ScorerConfig(path=str(tmp_path / "a" / "clip")), "cpu")
    engine = TransformersEngine(policy)
    evaluation = evaluate(HARBOUR, engine, scorer, split=Split.DEVELOPMENT, seed=10_000, num_scenes=4)
    assert evaluation["metrics"]["words"]["n"] == 4
