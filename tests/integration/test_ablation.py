"""Test csr ablate on the shipped model: one ledger, and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from csr_vlm.cli import console
from csr_vlm.cli.app import app
from csr_vlm.store.run import Run
from tests.integration.conftest import small_config


@pytest.fixture(autouse=True)
def _loud(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep libraries from being silenced: that would outlast the test."""
    monkeypatch.setattr(console, "quiet_libraries", lambda: None)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a recipe of one iteration and one step, whose search the reward does not steer."""
    folder = tmp_path_factory.mktemp("recipe")
    method = {
        "search": {"steer_by": "logprob"},
        "reward": {"unit": "sentence", "text_score": "geometric_mean", "text_scale": 100.0},
        "pairs": {"min_margin": 0.5, "questions": {"per_prompt": 0}},
    }
    training = {"trl": {"max_steps": 1, "per_device_train_batch_size": 4}}
    config = small_config(folder, iterations=1, method=method, training=training, evaluation={"audit": "warn"})
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(config.dump()))
    return path


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_one_ledger_serves_all_variants_and_the_cost_is_told_before(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "ablation"
    options = ["--out", out, "--lambda", ""]
    planned = json.loads(invoke("ablate", recipe, *options, "--dry-run", "--json", "-q").stdout)
    assert [row["name"] for row in planned["variants"]] == ["both", "only R_T", "only R_I"]
    assert all(row["own_run"] is None and row["hours"] > 0 for row in planned["variants"])
    assert planned["variants"][1]["hours"] < planned["variants"][0]["hours"], "a training costs less than a run"
    assert not out.exists(), "a dry run writes nothing"

    shown = invoke("ablate", recipe, *options, "--json", "-q")
    assert shown.exit_code == 0, shown.exception
    rows = json.loads(shown.stdout)["variants"]
    assert [row["name"] for row in rows] == ["base", "both", "only R_T", "only R_I"]
    assert all(row["metrics"]["heldout"]["relevance"]["n"] == 2 for row in rows)
    assert [path.parent.name for path in out.glob("*/config.yaml")] == ["both"], "one run, one ledger"
    assert len(list(out.glob("*/adapter/adapter_model.safetensors"))) == 3
    run = Run.open(out / "both")
    assert run.is_done(1, "train")

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = invoke("ablate", recipe, *options, "-q")
    assert again.exit_code == 0, again.exception
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before
    assert "only R_T" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lambda", "0.5,2"], "not between 0 and 1"),
        (["--lambda", "half"], "not between 0 and 1"),
        (["--presets", "papper", "--dry-run"], "papper"),
    ],
)
def test_wrong_values_are_named(recipe: Path, arguments: list[str], message: str) -> None:
    shown = invoke("ablate", recipe, *arguments, "-q")
    assert shown.exit_code == 1
    assert message in str(shown.exception)
