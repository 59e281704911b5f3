"""Test that csr init writes a recipe that csr check accepts, for a LLaVA and a Qwen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from csr_vlm.cli import init as verb
from csr_vlm.cli.app import app
from csr_vlm.core.records import Prompt
from csr_vlm.world.demo import assets
from tests.families.checkpoints import checkpoint


def csr(*arguments: object, **options: str) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], prog_name="csr", **options)


@pytest.fixture(params=["llava", "qwen2_5_vl"])
def model(request: pytest.FixtureRequest) -> Path:
    return assets() / "llava" if request.param == "llava" else checkpoint(request.param)


def test_a_recipe_from_flags_passes_the_check(model: Path, prompts: list[Prompt], tmp_path: Path) -> None:
    images, recipe = Path(prompts[0].image).parent, tmp_path / "mine.yaml"
    arguments = ("--model", model, "--images", images, "--gpu", "cpu", "--scorer", assets() / "clip", "--out", recipe)
    written = csr("init", *arguments, "--json")
    assert written.exit_code == 0, written.exception
    document = json.loads(written.stdout)
    assert document["written"] == [str(recipe)]
    assert document["estimate"]["prompts"] == len(prompts)
    checked = csr("check", recipe, "--json")
    assert checked.exit_code == 0, checked.exception
    assert json.loads(checked.stdout)["config"] == document["settings"]
    refused = csr("init", *arguments)
    assert "exists" in str(refused.exception)


def test_a_terminal_is_asked_until_the_answer_is_valid(
    prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = Path(prompts[0].image).parent
    monkeypatch.setattr(verb, "sys", Terminal())
    answers = ["no/such/model", str(assets() / "llava"), "no-such-folder", str(images), "gpu", "cpu"]
    recipe = tmp_path / "mine.yaml"
    asked = csr("init", "--scorer", assets() / "clip", "--out", recipe, input="\n".join(answers) + "\n")
    assert asked.exit_code == 0, asked.exception
    assert asked.stderr.count("error:") == 3
    assert f"path: {assets() / 'llava'}" in recipe.read_text()


class Terminal:
    """Stand in for sys with a stdin that is a terminal."""

    import sys as _sys

    @property
    def stdin(self) -> object:
        return self

    def isatty(self) -> bool:
        return True

    @property
    def stderr(self) -> object:
        return self._sys.stderr


def test_without_a_terminal_a_missing_option_is_named() -> None:
    assert "--model is missing" in str(csr("init").exception)
    assert "--images is missing" in str(csr("init", "--model", "llava-1.5-7b", "--offline").exception)
