"""Test the command line, including the mistakes of a new user."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from csr_vlm.config.schema import RunConfig
from tests.integration.conftest import small_config
from tests.processes import csr


def csr_alone(*arguments: object, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Execute a command of csr in a new interpreter, as a shell does."""
    command = [sys.executable, "-m", "csr_vlm.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=check, env=os.environ | environment)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli")
    config: RunConfig = small_config(directory, iterations=1, evaluation={"world": {"num_scenes": 10}})
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(config.dump()))
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path) -> Path:
    """Make a run stage by stage."""
    out = recipe.parent / "run"
    csr_alone("generate", recipe, "--out", out, "--quiet")
    refused = csr("train", out, check=False)
    assert refused.returncode == 1
    assert "has no finished pairs stage" in refused.stderr
    csr("pairs", out)
    csr("train", out, "--quiet")
    csr("run", out, "--quiet")
    return out


def processor_seconds() -> float:
    """Return the processor time of finished children, which does not depend on other load."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_quick_and_names_every_verb() -> None:
    times = []
    for _ in range(3):
        before = processor_seconds()
        shown = csr_alone("--help").stdout
        times.append(processor_seconds() - before)
    verbs = (
        "run demo check generate score pairs audit train sweep ablate eval compare watch reproduce analyze show report "
        "merge push export convert compact env world version help"
    ).split()
    assert all(f"  {verb} " in shown for verb in verbs)
    assert "More:" not in shown, "give the new verb its place in csr_vlm.cli.common.SECTIONS"
    assert min(times) < 0.8, "heavy libraries take seconds"


def test_demo_prints_json_only(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    shown = csr("demo", "--out", out, "--prompts", 8, "--scenes", 10, "--json", "iterations=1")
    found = json.loads(shown.stdout)
    assert [row["iteration"] for row in found["iterations"]] == [0, 1]
    assert Path(found["report"]).is_file()
    assert Path(found["adapter"], "adapter_model.safetensors").is_file()
    assert "searching" in shown.stderr


def test_check_prints_the_resolved_configuration_and_the_cost(recipe: Path) -> None:
    shown = csr("check", recipe, "--quiet", "--json").stdout
    found = json.loads(shown)
    assert found["config"]["method"]["lambda"] == 0.9
    assert found["data"]["accepted"] == found["estimate"]["prompts"] == 16
    assert found["estimate"]["parameters"] > 1_000_000
    assert found["estimate"]["log_prob_difference_nats"] < 1e-4
    assert found["estimate"]["scorer_agreement"] > 0.5
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
    assert "expected an id such as harbour-prompts-0-000000" in unknown.stderr


def test_pairs_under_other_settings_leave_the_run_unchanged(finished: Path, tmp_path: Path) -> None:
    before = (finished / "iteration-1" / "pairs.parquet").read_bytes()
    other = json.loads(csr("pairs", finished, "method.lambda=1.0", "--json", "--out", tmp_path / "p.parquet").stdout)
    original = json.loads(csr("pairs", finished, "--json").stdout)
    assert other["chosen_reward"] != original["chosen_reward"]
    assert (finished / "iteration-1" / "pairs.parquet").read_bytes() == before
    assert (tmp_path / "p.parquet").is_file()


def test_another_scorer_is_added_to_the_ledger(finished: Path) -> None:
    model = yaml.safe_load((finished / "config.yaml").read_text())["scorer"]["path"]
    csr("score", finished, "--scorer", model, "--name", "second", "-q")
    first = csr("pairs", finished, "scorer.name=clip", "--json").stdout
    assert csr("pairs", finished, "scorer.name=second", "--json").stdout == first
    unknown = csr("pairs", finished, "scorer.name=third", check=False)
    assert "the claims have no score by 'third'" in unknown.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "recipe or run nowhere.yaml does not exist"),
        (["run", "recipes/lava-1.5-7b.yaml"], "did you mean recipes/llava-1.5-7b.yaml?"),
        (["show", "/nonexistent"], "is not a run directory"),
        (["check", "RECIPE", "method.lamda=0.3"], "did you mean method.lambda?"),
        (["check", "RECIPE", "lambda=0.3"], "did you mean method.lambda?"),
        (["check", "RECIPE", "generation.attention=shard"], "did you mean shared?"),
        (["eval", "chiar"], "did you mean chair?"),
        (["check", "RECIPE", "method.lambda=3"], "less than or equal to 1"),
        (["check", "RECIPE", "method.lambda"], "is not a valid override"),
        (["check", "RECIPE", "training.trl.lerning_rate=1"], "did you mean learning_rate?"),
        (["check", "RECIPE", "training.trl.learning_rate=fast"], "should be a number"),
        (["check", "RECIPE", "training.trl.bf16=no"], "should be a number or true or false"),
        (["check", "RECIPE", "data.questions=What"], "data.questions should be a list"),
        (["check", "RECIPE", "model.device=gpu"], "not a valid torch device"),
        (["check", "RECIPE", "data.image_root=/nonexistent"], "there is no folder /nonexistent"),
        (["check", "RECIPE", "preset=calibratd"], "did you mean calibrated?"),
        (
            ["check", "RECIPE", "model.path=/nonexistent"],
            "error: the model /nonexistent cannot be loaded\nwhy: there is no such directory\nhint: ",
        ),
        (["check", "RECIPE", "data.prompts=/nonexistent.jsonl"], "cannot be opened"),
    ],
)
def test_mistakes_give_an_error_line_and_a_hint(recipe: Path, arguments: list[str], message: str) -> None:
    shown = csr(*[recipe if part == "RECIPE" else part for part in arguments], check=False)
    assert shown.returncode == 1
    assert message in shown.stderr
    assert "Traceback" not in shown.stderr
    assert shown.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "error: no such command 'rnu'\nhint: did you mean run?\n"),
        (["shwo", "runs/x"], "error: no such command 'shwo'\nhint: did you mean show?\n"),
        (["run", "r.yaml", "--port", "x"], "error: no such option --port\nhint: did you mean --out?\n"),
        (["run", "r.yaml", "--ot", "x"], "error: no such option --ot\nhint: did you mean --json or --out?\n"),
        (["sweep", "r"], "error: missing argument 'KEY=V,V'\nhint: csr sweep --help lists its arguments\n"),
        (["export", "r", "--format", "f"], "error: invalid value for '--format'\nwhy: 'f' is not one of 'trl', "),
    ],
)
def test_a_mistyped_command_line_gives_an_error_line_and_a_hint(arguments: list[str], message: str) -> None:
    shown = csr(*arguments, check=False)
    assert shown.returncode == 2
    assert shown.stderr.startswith(message)
    assert shown.stdout == ""


def test_a_run_with_other_settings_is_not_continued(finished: Path, recipe: Path) -> None:
    shown = csr("run", recipe, "method.lambda=0.4", "--out", finished, check=False)
    assert shown.returncode == 1
    assert "method.lambda" in shown.stderr


def test_world_check_measures_the_shipped_models() -> None:
    found = json.loads(csr("world", "check", "--scenes", 20, "--json", "-q").stdout)
    assert found["scorer"]["auc_absent"] > 0.97
    assert found["policy"]["recall"]["n"] == 20


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("csr aud", "audit"),
        ("csr eval ch", "chair"),
        ("csr run recipes/quick", "recipes/quickstart.yaml"),
        ("csr run recipes/quickstart.yaml method.lam", "method.lambda="),
        ("csr compare RUNS", "runs/here"),
    ],
)
def test_the_shell_completes(words: str, offered: str, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "quickstart.yaml").write_text("")
    (tmp_path / "runs" / "here").mkdir(parents=True)
    (tmp_path / "runs" / "here" / "config.yaml").write_text("")
    words = words.replace("RUNS", "ru")
    shown = subprocess.run(
        [sys.executable, "-m", "csr_vlm.cli"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"_CSR_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))},
    )
    assert offered in shown.stdout.split()


def test_a_dry_run_lists_the_steps_and_writes_nothing(recipe: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    fresh = json.loads(csr("run", recipe, "--out", out, "--dry-run", "--json", "-q").stdout)
    assert not out.exists()
    assert {step["state"] for step in fresh["steps"]} == {"to do"}
    assert fresh["estimate"]["prompts"] == 16
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    done = json.loads(csr("run", finished, "--dry-run", "--json", "-q").stdout)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    assert {step["state"] for step in done["steps"]} == {"done"}
    markers = {(int(path.parts[-3].split("-")[1]), path.stem) for path in finished.glob("iteration-*/done/*.json")}
    choice = (0, "engine")  # no step of its own
    assert {(step["iteration"], step["stage"]) for step in done["steps"]} == markers - {choice}
    assert [step["stage"] for step in fresh["steps"]] == [step["stage"] for step in done["steps"]]
    more = csr("run", recipe, "iterations=2", "--out", finished, "--dry-run").stdout
    assert re.search(r"6 of 14 steps left, about \d+", more), "two more iterations are timed by the first"


def test_output_options_work_before_and_after_the_verb(finished: Path) -> None:
    loud = csr("show", finished)
    assert "next: csr show" in loud.stderr
    for arguments in (["--quiet", "show", finished], ["show", finished, "-q"]):
        quiet = csr(*arguments)
        assert quiet.stderr == ""
        assert quiet.stdout == loud.stdout
    as_json = csr("--json", "show", finished)
    assert json.loads(as_json.stdout)["last_trained"] == 1
    tree = json.loads(csr("show", finished, "harbour-prompts-0-000003", "--json").stdout)
    assert tree["pairs"]
    assert {"sentence", "status", "reward"} <= tree["nodes"][0].keys()


def test_color_can_be_switched_off(finished: Path) -> None:
    forced = {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "TERM": "xterm-256color"}
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}

    def shown(*arguments: object, **more: str) -> str:
        command = [sys.executable, "-m", "csr_vlm.cli", "show", str(finished), *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment | forced | more
        ).stdout

    assert "\x1b[" in shown()
    assert "\x1b[" not in shown("--no-color")
    assert "\x1b[" not in shown(NO_COLOR="1")


def test_verbs_that_write_files_name_them(finished: Path, tmp_path: Path) -> None:
    plain = csr("report", finished)
    assert plain.stdout.strip() == str(finished / "report.html")
    assert "next: open" in plain.stderr
    found = json.loads(csr("export", finished, "--format", "trl", "--out", tmp_path / "out", "--json").stdout)
    assert all(Path(path).exists() for path in found["written"])
    assert found["pairs"] > 0
    trained = json.loads(csr("train", finished, "--json").stdout)
    assert trained["stage"] == "train"


def test_a_bug_leaves_its_traceback_in_a_file_and_not_on_the_screen(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import csr_vlm.store.run as run\ndef broken():\n    raise KeyError('a bug')\nrun.versions = broken\n"
    )
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    shown = csr_alone("env", check=False, PYTHONPATH=path, TMPDIR=str(tmp_path))
    assert shown.returncode == 1
    assert "Traceback" not in shown.stderr
    assert shown.stderr.startswith("error: internal error: KeyError\nwhy: 'a bug'\nhint: ")
    (kept,) = tmp_path.glob("csr-error-*.txt")
    assert "broken" in kept.read_text()
    assert "Traceback" in csr_alone("env", "--debug", check=False, PYTHONPATH=path).stderr


def test_an_unwritable_directory_is_an_error(recipe: Path) -> None:
    shown = csr("run", recipe, "--out", "/proc/nowhere", check=False)
    assert shown.returncode == 1
    assert "Traceback" not in shown.stderr
    assert shown.stderr.startswith("error: /proc/nowhere")
    assert "\nhint: " in shown.stderr
