"""Test every recipe: it resolves, and its cost is estimated without loading a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPConfig, CLIPModel, LlavaConfig, Qwen2_5_VLConfig
from typer.testing import CliRunner

from csr_vlm.cli.app import app
from csr_vlm.config.load import load_config
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Silent
from csr_vlm.data.prompts import InputReport, read_prompts
from csr_vlm.models.architecture import ScorerShape, published_architecture, read_architecture, scorer_shape
from csr_vlm.models.loading import load_prompt_encoder
from csr_vlm.pipeline import estimate as module
from csr_vlm.pipeline.estimate import estimate
from csr_vlm.pipeline.hardware import parse_gpu
from csr_vlm.pipeline.stages import check_inputs, generate
from csr_vlm.store.run import Run
from csr_vlm.training.dpo import trainer_arguments
from csr_vlm.world.demo import assets
from tests.integration.conftest import small_config

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
GPUS = {"quickstart": None, **{path.stem: "4090" for path in RECIPES if "24gb" in path.stem}}
"""GPU that a recipe is for, where it is not one with 80 GB."""
GPUS |= {"gemma-3-4b": "4090", "smolvlm": "4090"}


@pytest.fixture(autouse=True)
def _no_model_is_loaded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "recipe" in request.fixturenames:

        def touched(*_: object, **__: object) -> None:
            raise AssertionError("a model was loaded")

        monkeypatch.setattr(AutoConfig, "from_pretrained", touched)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_passes_the_offline_check_and_fits_its_gpu(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no prompts lie, whatever was exported beside the recipes
    config = load_config(recipe)
    gpu = GPUS.get(recipe.stem, "a100-80")
    found = estimate(config, Silent(), offline=True, hardware=parse_gpu(gpu or "h100"))
    assert (found.plan is None) == (recipe.stem == "quickstart"), "only its model is nowhere"
    assert any("does not exist yet" in warning for warning in found.warnings)
    assert not [warning for warning in found.warnings if "fit" in warning]
    if found.plan is not None:
        assert found.plan.architecture.source == "the table of published models"
        assert found.plan.lengths.longest < found.plan.architecture.context
    arguments = trainer_arguments(config.training, tmp_path, 0, "cpu")
    assert arguments.beta == 0.1
    if config.preset == "calibrated" and recipe.stem != "quickstart":
        assert arguments.learning_rate == 5e-6
        assert 2 <= config.method.pairs.per_prompt <= 4


def check(*arguments: str) -> dict[str, Any]:
    shown = CliRunner().invoke(app, ["check", *arguments, "--json", "--quiet"])
    assert shown.exit_code == 0, shown.output
    found: dict[str, Any] = json.loads(shown.stdout)
    return found


def test_a_run_is_planned_for_a_gpu_that_is_not_there() -> None:
    recipe = str(next(path for path in RECIPES if path.stem == "llava-1.5-7b"))
    found = check(recipe, "--gpu", "h200", "--offline", "model.device=cuda", "data.limit=13000")["estimate"]
    assert found["parameters"] == pytest.approx(7.06e9, rel=1e-3)
    assert found["hardware"] == {"name": "H200", "count": 1}
    assert found["hours"]["total"]["low"] < found["hours"]["total"]["high"]
    assert found["log_prob_difference_nats"] is None
    here = check(recipe, "--offline")
    assert here["estimate"]["hardware"]["name"] == "cpu"
    assert any("--gpu h200" in warning for warning in here["warnings"])
    refused = CliRunner().invoke(app, ["check", recipe, "--offline", "--gpu", "h2000"])
    assert refused.exit_code == 1
    assert "not a known GPU" in str(refused.exception) + refused.output


def test_the_architecture_of_a_model_on_disk_is_its_own(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    shape = read_architecture(config.model, offline=True)
    assert shape is not None
    # The world's LLaVA: 4 layers of width 128, 4 heads of 32 with keys and values each.
    assert (shape.source, shape.layers, shape.width, shape.cache_bytes(4)) == ("config.json", 4, 128, 4 * 256 * 4)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(config.model.path))
    exact = sum(parameter.numel() for parameter in model.parameters())
    assert shape.parameters == pytest.approx(exact, rel=0.03)


def test_the_size_of_a_scorer_on_disk_is_its_own(tmp_path: Path) -> None:
    path = str(assets() / "clip")
    with torch.device("meta"):
        exact = CLIPModel(CLIPConfig.from_pretrained(path)).num_parameters()
    shape = scorer_shape(path)
    assert shape.parameters == pytest.approx(exact, rel=0.15)
    assert shape.vision_parameters < exact < 2_000_000
    assert scorer_shape(str(tmp_path)) == scorer_shape("org/another") == ScorerShape()


def test_published_shapes_have_the_parameters_of_their_models() -> None:
    text = {"hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944, "num_attention_heads": 28}
    qwen = Qwen2_5_VLConfig(
        text_config={"model_type": "qwen2_5_vl_text", **text, "num_key_value_heads": 4, "vocab_size": 152064},
        vision_config={"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
    )
    for name, config in (("llava-hf/llava-1.5-7b-hf", LlavaConfig()), ("Qwen/Qwen2.5-VL-7B-Instruct", qwen)):
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        published = published_architecture(name)
        assert published is not None
        assert published.parameters == pytest.approx(model.num_parameters(), rel=1e-3)


def test_prompts_are_measured_with_the_processor(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    found = estimate(config, Silent(), offline=True)
    assert found.plan is not None
    lengths = found.plan.lengths
    assert lengths.source == "measured with the processor on 16 prompts"
    encoder = load_prompt_encoder(config.model)
    rows = [encoder.process(prompt)["input_ids"][0] for prompt in read_prompts(config.data, InputReport())]
    assert lengths.mean == pytest.approx(sum(map(len, rows)) / 16)
    assert lengths.longest == max(map(len, rows))
    assert lengths.image == 36, "72 x 72 pixels in patches of 12"


def test_a_run_on_this_machine_replaces_assumptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = small_config(tmp_path, iterations=1)
    run = Run.create(tmp_path / "runs" / "first", config)
    check_inputs(run, Silent())
    generate(run, 1, Silent())
    result = run.result(1, "generate")
    assert (result["devices"], result["processes"]) == ({"cpu": run.num_prompts}, 1)
    found = estimate(config, Silent(), offline=True, runs=[run.root])
    assert found.plan is not None
    assert found.plan.measured is not None
    assert found.plan.measured.covered == ["prefill", "search", "scoring"]
    seconds = sum(found.plan.hours[stage].likely for stage in found.plan.measured.covered) * 3600
    assert seconds == pytest.approx(result["seconds"] * 16 / run.num_prompts)


def test_what_would_stop_a_run_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path, model={"path": str(assets() / "llava"), "device": "cpu", "adapter": "nowhere"})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    warnings = " ".join(estimate(config, Silent()).warnings)
    assert "model.adapter nowhere does not exist" in warnings
    assert "are free on this disk" in warnings


def test_four_bits_need_a_gpu_and_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from csr_vlm.models import loading

    config = small_config(tmp_path, model={"path": str(assets() / "llava"), "device": "cpu", "quantization": "nf4"})
    with pytest.raises(CsrError, match="CUDA"):
        loading.load_base(config.model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(loading, "is_installed", lambda _: False)
    with pytest.raises(CsrError, match="bitsandbytes"):
        loading.load_base(config.model.model_copy(update={"device": "cuda"}))
