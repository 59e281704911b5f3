"""A few pictures tell, before a run, whether model and scorer do as they should."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from csr_vlm.config.load import merged, resolve
from csr_vlm.config.schema import ModelConfig
from csr_vlm.core.progress import Silent
from csr_vlm.pipeline.preflight import _weights_at_hand, run_preflight
from csr_vlm.world.demo import assets
from tests.integration.conftest import small_config

AGREEMENT = "scorer's agreement, 16 pictures"


def test_a_scorer_that_tells_pictures_apart_passes_and_one_that_does_not_is_warned_about(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    good = run_preflight(config, Silent())
    assert good["estimate"][AGREEMENT] > 0.75
    assert good["estimate"]["generated against scored, nats a token"] < 1e-4
    assert good["warnings"] == []

    blind = tmp_path / "clip"
    shutil.copytree(assets() / "clip", blind)
    torch.manual_seed(0)
    CLIPModel(CLIPConfig.from_pretrained(blind)).save_pretrained(blind)
    bad = run_preflight(resolve(merged(config.dump(), {"scorer": {"path": str(blind)}})), Silent())
    assert 0.3 < bad["estimate"][AGREEMENT] < 0.65
    assert "suit their own picture better than others" in bad["warnings"][0]


def test_weights_in_the_hubs_cache_are_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--org--model"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = ModelConfig(path="org/model")
    assert not _weights_at_hand(model)
    (snapshot / "model.safetensors").touch()
    assert _weights_at_hand(model)
    assert not _weights_at_hand(ModelConfig(path="org/model", revision="v2"))
    assert not _weights_at_hand(ModelConfig(path="org/other"))


def test_without_weights_or_other_pictures_nothing_is_said(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    assert run_preflight(resolve(merged(config.dump(), {"model": {"path": "org/model"}})), Silent())["estimate"] == {}
    alone = resolve(merged(config.dump(), {"data": {"limit": 1}}))
    assert list(run_preflight(alone, Silent())["estimate"]) == ["generated against scored, nats a token"]
