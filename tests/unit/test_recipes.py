"""Use the recipes that come with the package: by name, from any folder, and copied."""

from __future__ import annotations

import fnmatch
import json
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from csr_vlm.cli.app import app
from csr_vlm.cli.arguments import complete_run, default_out
from csr_vlm.config.load import load_config
from csr_vlm.config.shipped import shipped_files, shipped_recipes
from csr_vlm.core.errors import CsrError
from csr_vlm.core.installing import install_command

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "csr_vlm"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Work in a folder without a copy of the repository, as after installing a wheel."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def csr(*arguments: object) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_is_found_by_its_name(name):
    assert load_config(Path(name)) == load_config(shipped_recipes()[name])
    assert default_out(name) == Path("runs") / name, "the 5 of 1.5 is no suffix"
    assert default_out(f"recipes/{name}.yaml") == Path("runs") / name


def test_a_file_of_the_same_name_comes_first(elsewhere):
    text = shipped_recipes()["smolvlm"].read_text(encoding="utf-8")
    (elsewhere / "smolvlm").write_text(text.replace("seed: 0", "seed: 7"))
    assert load_config(Path("smolvlm")).seed == 7


def test_a_wrong_name_gets_the_nearest_one():
    with pytest.raises(CsrError) as caught:
        load_config(Path("lava-1.5-7b"))
    assert caught.value.hint == "did you mean llava-1.5-7b?"
    with pytest.raises(CsrError, match="not a shipped recipe") as caught:
        csr("recipes", "lava-1.5-7b")
    assert caught.value.hint == "did you mean llava-1.5-7b?"


def test_recipes_are_listed_and_copied(elsewhere, capsys):
    csr("recipes")
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert listed.keys() == shipped_files().keys()
    assert listed["llava-1.5-7b"].startswith("LLaVA-1.5-7B with the default preset, for one GPU with 80 GB")
    csr("recipes", "--json")
    assert json.loads(capsys.readouterr().out)["quickstart"]["about"].startswith("The whole method")
    csr("recipes", "llava-1.5-7b", "accelerate/fsdp2", "--out", "mine")
    for name in ("llava-1.5-7b", "accelerate/fsdp2"):
        assert (elsewhere / "mine" / f"{name}.yaml").read_bytes() == shipped_files()[name].read_bytes()
    csr("recipes", "llava-1.5-7b.yaml", "--out", "mine")
    (elsewhere / "mine" / "llava-1.5-7b.yaml").write_text("seed: 1")
    with pytest.raises(CsrError, match="has another content"):
        csr("recipes", "smolvlm", "llava-1.5-7b", "--out", "mine")
    assert not (elsewhere / "mine" / "smolvlm.yaml").exists(), "all or none"


def test_every_file_of_the_package_is_in_a_wheel():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["csr_vlm"]
    files = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*") if path.is_file()]
    data = [name for name in files if not name.endswith((".py", ".pyc"))]
    assert "config/recipes/quickstart.yaml" in data
    flat = [pattern.replace("**/", "*") for pattern in patterns]
    assert [name for name in data if not any(fnmatch.fnmatch(name, pattern) for pattern in flat)] == []


def test_runs_are_completed_but_not_recipes(elsewhere):
    (elsewhere / "runs" / "q").mkdir(parents=True)
    (elsewhere / "runs" / "q" / "config.yaml").write_text("")
    assert complete_run("") == ["runs/q"]


def test_install_commands_name_packages_that_pip_can_find():
    extras = metadata.metadata("csr-vlm").get_all("Provides-Extra")
    assert extras is not None
    for extra in extras:
        command = install_command(extra)
        assert command.startswith("pip install '")
        assert "csr-vlm" not in command
    assert install_command("families") == "pip install 'num2words' 'torchvision'"


def test_lmms_eval_is_installed_with_the_filelock_that_it_works_with():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "filelock<4.3" in extras["eval"]
