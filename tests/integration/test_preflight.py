"""Test the preflight: a few images show whether model and scorer work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from csr_vlm.config.load import merged, resolve
from csr_vlm.config.schema import ModelConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Silent
from csr_vlm.pipeline.preflight import Preflight, _has_local_weights, run_preflight
from csr_vlm.world.demo import assets
from tests.integration.conftest import small_config


def test_an_untrained_scorer_is_a_warning(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    good = run_preflight(config, Silent())
    assert good.scorer_agreement > 0.75
    assert good.scorer_images == 16
    assert good.log_prob_difference_nats < 1e-4
    assert good.warnings == []

    blind = tmp_path / "clip"
    shutil.copytree(assets() / "clip", blind)
    torch.manual_seed(0)
    CLIPModel(CLIPConfig.from_pretrained(blind)).save_pretrained(blind)
    bad = run_preflight(resolve(merged(config.dump(), {"scorer": {"path": str(blind)}})), Silent())
    assert 0.3 < bad.scorer_agreement < 0.65
    assert "higher for their own image than for negative images" in bad.warnings[0]


def test_weights_in_the_hub_cache_are_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--org--model"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = ModelConfig(path="org/model")
    assert not _has_local_weights(model)
    (snapshot / "model.safetensors").touch()
    assert _has_local_weights(model)
    assert not _has_local_weights(ModelConfig(path="org/model", revision="v2"))
    assert not _has_local_weights(ModelConfig(path="org/other"))


def test_without_weights_or_negatives_nothing_is_measured(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    absent = run_preflight(resolve(merged(config.dump(), {"model": {"path": "org/model"}})), Silent())
    assert absent == Preflight(skipped="its weights are not on this machine")
    alone = resolve(merged(config.dump(), {"data": {"limit": 1}}))
    result = run_preflight(alone, Silent())
    assert result.log_prob_difference_nats is not None
    assert (result.scorer_agreement, result.scorer_images) == (None, None)


def test_a_large_model_is_not_loaded_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from csr_vlm.pipeline import preflight

    config = small_config(tmp_path)
    monkeypatch.setattr(preflight, "TOO_LARGE_FOR_A_CPU", 1e5)
    assert "too large for a CPU" in str(run_preflight(config, Silent()).skipped)
    elsewhere = resolve(merged(config.dump(), {"model": {"device": "cuda"}}))
    assert "cuda" in str(run_preflight(elsewhere, Silent(), planned=True).skipped)
    with pytest.raises(CsrError, match="cuda"):
        run_preflight(elsewhere, Silent())
