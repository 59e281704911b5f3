"""Test what csr init chooses, on models that only a name or a configuration describes."""

from __future__ import annotations

import doctest
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from csr_vlm.config.load import load_config
from csr_vlm.config.schema import ModelConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.models.architecture import Architecture
from csr_vlm.pipeline import recipe_proposal
from csr_vlm.pipeline.recipe_proposal import (
    CLIP,
    ModelFacts,
    Proposal,
    Wishes,
    gpu_memory,
    propose_recipe,
    render_recipe,
)
from csr_vlm.world.demo import assets

PICTURE_BYTES = b"not decoded by this test"


@pytest.fixture
def images(tmp_path: Path) -> str:
    folder = tmp_path / "my: photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(PICTURE_BYTES)
    return str(folder)


def proposed(images: str, model: str = "llava-hf/llava-1.5-7b-hf", gpu: str = "80gb", **wishes: object) -> Proposal:
    wished = Wishes(ModelConfig(path=model), images, 1000, gpu_memory(gpu), offline=True)
    return propose_recipe(replace(wished, **wishes))


def test_doctests() -> None:
    assert doctest.testmod(recipe_proposal).failed == 0


@pytest.mark.parametrize(
    ("name", "gb"),
    [("A100", 80), ("NVIDIA A100-40GB", 40), ("rtx_3090", 24), ("24", 24), ("H200", 141), ("cpu", None)],
)
def test_a_gpu_has_a_name_or_a_size(name: str, gb: float | None) -> None:
    assert gpu_memory(name) == gb


def test_an_unknown_gpu_is_refused_with_the_nearest() -> None:
    with pytest.raises(CsrError, match="did you mean h100"):
        gpu_memory("h10O")


def test_a_7b_model_gets_the_settings_of_its_recipes_and_of_its_size(images: str) -> None:
    for gpu, recipe in (("80gb", "llava-1.5-7b"), ("24gb", "llava-1.5-7b-24gb")):
        shipped = load_config(Path(__file__).parents[2] / "recipes" / f"{recipe}.yaml")
        config = proposed(images, gpu=gpu).config
        assert config.model.quantization == shipped.model.quantization
        assert config.training.lora == shipped.training.lora
        assert config.method == shipped.method
        assert config.generation.max_rows == shipped.generation.max_rows == "auto"
        trl = config.training.trl
        assert trl["learning_rate"] == shipped.training.trl["learning_rate"]
        assert trl["per_device_train_batch_size"] * trl["gradient_accumulation_steps"] == 32


def test_a_model_between_small_and_large_gets_its_own_learning_rate(images: str) -> None:
    assert proposed(images, "my/model-500m").config.training.trl["learning_rate"] == 2e-5


def test_the_written_recipe_is_what_was_proposed(images: str, tmp_path: Path) -> None:
    for language in ("en", "zh"):
        proposal = proposed(images, language=language)
        text = render_recipe(proposal, ["heading"])
        recipe = tmp_path / f"{language}.yaml"
        recipe.write_text(text, encoding="utf-8")
        assert load_config(recipe) == proposal.config
        keys = [line.strip() for line in text.splitlines() if line.endswith(":")]
        assert len(keys) == len(set(keys)), "a block is written twice"
        assert max(map(len, text.splitlines())) <= 120


def test_another_language_changes_scorer_questions_and_lexicon(images: str) -> None:
    config = proposed(images, language="zh").config
    assert "siglip2" in config.scorer.path
    assert config.method.claims.lexicon == "zh"
    assert config.method.pairs.questions.ask("猫", 0) == "图片中有猫吗？"
    assert config.data.questions == ("请详细描述这张图片。",)


@pytest.mark.parametrize(("size", "scorer"), [(336, CLIP), (224, "openai/clip-vit-large-patch14")])
def test_the_scorer_is_the_vision_encoder_where_it_has_a_text_encoder(
    images: str, monkeypatch: pytest.MonkeyPatch, size: int, scorer: str
) -> None:
    tower = {"model_type": "clip_vision_model", "hidden_size": 1024, "patch_size": 14, "image_size": size}
    facts = ModelFacts(Architecture.of_size(7_000_000_000), "llava", tower)
    monkeypatch.setattr(recipe_proposal, "read_facts", lambda *_args, **_options: facts)
    assert proposed(images).config.scorer.path == scorer
    monkeypatch.setattr(recipe_proposal, "read_facts", lambda *_args, **_options: replace(facts, vision={"a": 1}))
    assert proposed(images).config.scorer.path == CLIP


def test_vllm_is_chosen_where_it_is_installed_and_supports_the_run(
    images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert proposed(images).config.generation.engine == "auto"
    monkeypatch.setattr(recipe_proposal, "is_installed", lambda _name: True)
    assert proposed(images).config.generation.engine == "vllm"
    assert proposed(images, gpu="24gb").config.generation.engine == "auto"  # quantized
    assert proposed(images, engine="transformers").config.generation.engine == "transformers"


def test_more_memory_means_more_rows_and_a_model_that_does_not_fit_is_refused(images: str) -> None:
    parts = [proposed(images, gpu=f"{gb}gb").config.generation.prompts_per_part for gb in (40, 80, 141)]
    assert parts == sorted(parts)
    assert len(set(parts)) == 3
    with pytest.raises(CsrError, match="does not fit 24 GB"):
        proposed(images, "my/giant-70b", gpu="24gb")


def test_few_and_many_prompts(images: str) -> None:
    assert "1,000 or more" in proposed(images, num_prompts=20).notes[0]
    assert proposed(images, num_prompts=50_000).config.data.sample == 13_000


def test_a_tiny_model_keeps_the_preset(images: str) -> None:
    config = proposed(images, str(assets() / "llava"), gpu="cpu", offline=False).config
    assert config.training.lora.r == 16
    assert yaml.safe_load(yaml.safe_dump(config.training.trl))["learning_rate"] == 3e-4
