"""Test every recipe: it resolves, and its cost is estimated without loading a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from csr_vlm.cli.app import app
from csr_vlm.config.load import load_config
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Silent
from csr_vlm.pipeline import estimate as module
from csr_vlm.pipeline.estimate import Shape, estimate, shape_from_name, shape_of
from csr_vlm.training.dpo import trainer_arguments
from csr_vlm.world.demo import assets
from tests.integration.conftest import small_config

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
WITHOUT_SIZE = {"quickstart", "smolvlm"}
"""Recipes whose model names have no size."""


@pytest.fixture(autouse=True)
def _no_model_is_loaded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "recipe" in request.fixturenames:

        def touched(*_: object, **__: object) -> None:
            raise AssertionError("a model was loaded")

        monkeypatch.setattr(AutoConfig, "from_pretrained", touched)
        monkeypatch.setattr(module, "measured_flops", lambda *_: 1e12)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_passes_the_offline_check(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where no prompts lie, whatever was exported beside the recipes
    config = load_config(recipe)
    found = estimate(config, Silent(), offline=True)
    assert (found.costs is None) == (recipe.stem in WITHOUT_SIZE)
    assert any("does not exist yet" in warning for warning in found.warnings)
    arguments = trainer_arguments(config.training, tmp_path, 0, "cpu")
    assert arguments.beta == 0.1


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits_the_gpu_that_it_is_for(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(recipe, ["model.dtype=bfloat16"])
    if recipe.stem in WITHOUT_SIZE:
        pytest.skip("its size is not in its name")
    if "qwen" in recipe.stem or "gemma" in recipe.stem:
        pytest.skip("its keys and values are shared by several heads, as only its configuration shows")
    costs = estimate(config, Silent(), offline=True).costs
    assert costs is not None
    memory = 24 if "24gb" in recipe.stem else 80
    assert costs.search_memory_gb < memory
    assert costs.training_memory_gb < memory


def test_the_offline_check_is_on_the_command_line() -> None:
    recipe = next(path for path in RECIPES if path.stem == "llava-1.5-7b")
    shown = CliRunner().invoke(app, ["check", str(recipe), "model.device=cpu", "--offline", "--json", "--quiet"])
    assert shown.exit_code == 0
    found = json.loads(shown.stdout)
    assert found["estimate"]["parameters"] == 7_000_000_000
    assert found["estimate"]["log_prob_difference_nats"] is None
    assert found["estimate"]["search_hours_a100"] == pytest.approx(0.83, abs=0.01), "1,000 prompts, as in the README"
    assert any("no GPU" in warning for warning in found["warnings"])


def test_the_size_of_a_model_is_read_from_its_name() -> None:
    names = {
        "llava-hf/llava-1.5-13b-hf": 13_000_000_000,
        "Qwen/Qwen2.5-VL-7B-Instruct": 7_000_000_000,
        "HuggingFaceTB/SmolVLM-500M-Instruct": 500_000_000,
        "./models/qwen3-vl-0.6b": 600_000_000,
    }
    for name, parameters in names.items():
        shape = shape_from_name(name)
        assert shape is not None
        assert shape.parameters == parameters
    for name in ("HuggingFaceTB/SmolVLM-Instruct", "my/llava-1.5", "a/4bit", "a/v2b3"):
        assert shape_from_name(name) is None


def test_the_guessed_shape_is_that_of_llama() -> None:
    shape = Shape.of_size(7_000_000_000)
    # Llama-2-7B: 32 layers of width 4096; a LoRA of rank 128 on all seven linear maps of a layer
    # has 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 11008)) parameters.
    assert shape.layers in (32, 33)
    exact = 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert shape.lora_parameters(128) == pytest.approx(exact, rel=0.1)


def test_the_shape_of_a_model_on_disk_is_its_own(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    shape = shape_of(config.model)
    # The world's LLaVA: 4 layers of width 128, 4 heads of 32 with keys and values each.
    assert (shape.layers, shape.width, shape.cache_width) == (4, 128, 256)
    written = json.loads((assets() / "llava" / "config.json").read_text(encoding="utf-8"))
    assert written["text_config"]["hidden_size"] == shape.width


def test_what_will_not_fit_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measured_flops", lambda *_: 1e3)
    config = small_config(tmp_path, model={"path": str(assets() / "llava"), "device": "cpu", "adapter": "nowhere"})
    warnings = " ".join(estimate(config, Silent()).warnings)
    assert "hours" in warnings
    assert "model.adapter nowhere does not exist" in warnings
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    assert "are free on this disk" in " ".join(estimate(config, Silent()).warnings)


def test_four_bits_need_a_gpu_and_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from csr_vlm.models import loading

    config = small_config(tmp_path, model={"path": str(assets() / "llava"), "device": "cpu", "quantization": "nf4"})
    with pytest.raises(CsrError, match="CUDA"):
        loading.load_base(config.model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(loading, "find_spec", lambda _: None)
    with pytest.raises(CsrError, match="bitsandbytes"):
        loading.load_base(config.model.model_copy(update={"device": "cuda"}))
