"""Test the base models that only the evidence needs: a deeper LLaVA and one of another family."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from csr_vlm.config.schema import ModelConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.models.loading import load_policy
from csr_vlm.world.build import LEARN_TO_SEE, PICK_UP_HABITS, BuildPlan, dialogue_ids, picture_text, pixels
from csr_vlm.world.corpus import Turn
from csr_vlm.world.demo import assets, policy_in
from csr_vlm.world.scenes import HARBOUR, Split, make_scenes

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHORT = BuildPlan(
    policy_phases=tuple(replace(phase, steps=6) for phase in (LEARN_TO_SEE, PICK_UP_HABITS)), policy_batch=4
)


@pytest.fixture
def base_models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("base_models")


def test_another_family_has_the_same_ids_and_pixels_in_training_and_generation(
    base_models: ModuleType, tmp_path: Path, prompts
) -> None:
    base_models.build_idefics3(tmp_path, SHORT)
    policy = load_policy(ModelConfig(path=str(policy_in(tmp_path)), device="cpu"), None)
    assert policy.model.config.model_type == "idefics3"
    encoded = policy.encode(prompts[0])
    picture = picture_text(policy.processor)
    assert picture.count("<image>") == 9
    ids, _ = dialogue_ids(policy.processor, [Turn(prompts[0].text, "There is a red boat.")], picture)
    assert ids[: len(encoded.input_ids)] == encoded.input_ids.tolist()
    scene = next(make_scenes(HARBOUR, Split.DEVELOPMENT, 0, 1))
    assert torch.allclose(encoded.per_image["pixel_values"][0], pixels([scene]), atol=1e-5)
    with pytest.raises(CsrError, match="no base model"):
        policy_in(tmp_path / "clip")


def test_an_untrained_deeper_policy_computes_the_same_logits(base_models: ModuleType) -> None:
    shipped = LlavaForConditionalGeneration.from_pretrained(assets() / "llava", dtype=torch.float32).eval()
    deeper = base_models.deepen(shipped, 3).eval()
    assert len(deeper.model.language_model.layers) == 3 * len(shipped.model.language_model.layers)
    ids = torch.tensor([[1, 40, 50, 60]])
    with torch.inference_mode():
        assert torch.equal(deeper(input_ids=ids).logits, shipped(input_ids=ids).logits)


def test_continued_training_keeps_the_shipped_scorer(base_models: ModuleType, tmp_path: Path) -> None:
    base_models.build_from_shipped(HARBOUR, tmp_path, SHORT, depth=2)
    log = json.loads((tmp_path / "build.json").read_text())
    assert len(log["policy"]) == 2
    assert set(log["sha256"]) == {"clip/model.safetensors", "llava/model.safetensors"}
    assert (
        log["sha256"]["clip/model.safetensors"]
        == json.loads((assets() / "build.json").read_text())["sha256"]["clip/model.safetensors"]
    )
    assert load_policy(ModelConfig(path=str(tmp_path / "llava"), device="cpu"), None).model is not None
