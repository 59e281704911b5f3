"""The command line as a new user meets it, mistakes included."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from csr_vlm.config import RunConfig
from tests.integration.conftest import small_config


def csr(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "csr_vlm.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=check)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli")
    config: RunConfig = small_config(directory, iterations=1, evaluation={"world": {"num_scenes": 10}})
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(config.dump()))
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path) -> Path:
    """A run made stage by stage, as a careful user would."""
    out = recipe.parent / "run"
    csr("generate", recipe, "--out", out, "--quiet")
    refused = csr("train", out, check=False)
    assert refused.returncode == 1
    assert "has no finished pairs stage" in refused.stderr
    csr("pairs", out)
    csr("train", out, "--quiet")
    csr("run", out, "--quiet")
    return out


def test_help_is_quick_and_names_every_verb() -> None:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        shown = csr("--help").stdout
        times.append(time.perf_counter() - started)
    verbs = (
        "run demo check generate score pairs audit train sweep eval compare watch reproduce analyse show report merge "
        "push export convert env world"
    ).split()
    assert all(f"  {verb} " in shown for verb in verbs)
    assert min(times) < 1.0


def test_demo_prints_json_only(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    shown = csr("demo", "--out", out, "--prompts", 8, "--scenes", 10, "--json")
    found = json.loads(shown.stdout)
    assert [row["iteration"] for row in found["iterations"]] == [0, 1, 2, 3]
    assert Path(found["report"]).is_file()
    assert Path(found["adapter"], "adapter_model.safetensors").is_file()
    assert "searching" in shown.stderr


def test_check_prints_the_resolved_configuration_and_the_cost(recipe: Path) -> None:
    shown = csr("check", recipe, "--quiet", "--json").stdout
    found = json.loads(shown)
    assert found["config"]["method"]["lambda"] == 0.9
    assert found["data"]["accepted"] == found["estimate"]["prompts"] == 16
    assert found["estimate"]["parameters"] > 1_000_000
    assert found["estimate"]["generated against scored, nats a token"] < 1e-4
    assert found["warnings"] == []


def test_evaluation_on_scenes_of_another_seed(finished: Path) -> None:
    found = json.loads(csr("eval", "world", finished, "--scenes", 10, "--world-seed", 7, "--json", "-q").stdout)
    assert [row["iteration"] for row in found["iterations"]] == [0, 1]
    assert found["iterations"][1]["protocol"]["seed"] == 7


def test_show_draws_the_tree_and_marks_the_pair(finished: Path) -> None:
    assert "calibrated" in csr("show", finished).stdout
    tree = csr("show", finished, "harbour-prompts-0-000003").stdout
    assert "R_I" in tree
    assert "✓" in tree
    unknown = csr("show", finished, "nobody", check=False)
    assert unknown.returncode == 1
    assert "it has harbour-prompts-0-000000" in unknown.stderr


def test_pairs_under_other_settings_leave_the_runs_own_alone(finished: Path, tmp_path: Path) -> None:
    before = (finished / "iteration-1" / "pairs.parquet").read_bytes()
    other = json.loads(csr("pairs", finished, "method.lambda=1.0", "--json", "--out", tmp_path / "p.parquet").stdout)
    own = json.loads(csr("pairs", finished, "--json").stdout)
    assert other["chosen_reward"] != own["chosen_reward"]
    assert (finished / "iteration-1" / "pairs.parquet").read_bytes() == before
    assert (tmp_path / "p.parquet").is_file()


def test_another_scorer_joins_the_ledger(finished: Path) -> None:
    model = yaml.safe_load((finished / "config.yaml").read_text())["scorer"]["path"]
    csr("score", finished, "--scorer", model, "--name", "second", "-q")
    first = csr("pairs", finished, "scorer.name=clip", "--json").stdout
    assert csr("pairs", finished, "scorer.name=second", "--json").stdout == first
    unknown = csr("pairs", finished, "scorer.name=third", check=False)
    assert "has no score by 'third'" in unknown.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "there is no recipe nowhere.yaml"),
        (["show", "/nonexistent"], "is not a run directory"),
        (["check", "RECIPE", "method.lamda=0.3"], "did you mean lambda"),
        (["check", "RECIPE", "method.lambda=3"], "less than or equal to 1"),
        (["check", "RECIPE", "method.lambda"], "is not an override"),
        (["check", "RECIPE", "preset=calibratd"], "unknown preset"),
        (
            ["check", "RECIPE", "model.path=/nonexistent"],
            "the model /nonexistent cannot be loaded: there is no such directory",
        ),
        (["check", "RECIPE", "data.prompts=/nonexistent.jsonl"], "cannot be opened"),
    ],
)
def test_mistakes_are_told_in_a_line_and_a_hint(recipe: Path, arguments: list[str], message: str) -> None:
    shown = csr(*[recipe if part == "RECIPE" else part for part in arguments], check=False)
    assert shown.returncode == 1
    assert message in shown.stderr
    assert "Traceback" not in shown.stderr
    assert shown.stdout == ""


def test_a_run_with_other_settings_is_not_continued(finished: Path, recipe: Path) -> None:
    shown = csr("run", recipe, "method.lambda=0.4", "--out", finished, check=False)
    assert shown.returncode == 1
    assert "method.lambda" in shown.stderr


def test_world_check_measures_the_shipped_models() -> None:
    found = json.loads(csr("world", "check", "--scenes", 20, "--json", "-q").stdout)
    assert found["scorer"]["auc_absent"] > 0.97
    assert found["policy"]["recall"]["n"] == 20
