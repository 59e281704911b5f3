"""Run every documented command that needs neither a GPU nor the network, and the Python page as printed.

Commands run with fewer images and scenes than printed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from csr_vlm.cli.app import app
from tests.docs_blocks import GENERATED, PAGES, ROOT, Block, blocks, invocations

SMALLER = {
    ("demo", "--world", "prose"): ["--prompts=8", "--scenes=10", "iterations=1"],
    ("demo",): ["--prompts=8", "--scenes=10", "iterations=1"],
    ("run", "recipes/quickstart.yaml"): [
        *("iterations=1", "data.limit=12", "training.trl.max_steps=2", "evaluation.world.num_scenes=10"),
    ],
    ("run", "mine.yaml"): ["iterations=1", "data.limit=12", "training.trl.max_steps=2"],
    ("check", "recipes/quickstart.yaml"): ["data.limit=4"],
    ("world", "check"): ["--scenes=10"],
    ("world", "export"): ["--prompts=16"],
    ("world", "coco"): ["--scenes=10"],
}
"""Arguments added to commands that begin with these words, unless the command sets them."""
STOPPED = 3
"""Exit code of an audit that says stop, which is correct for so few images."""
MISSED = 1
"""Exit code of a world check that misses a bound, likewise."""
RUNNABLE = [
    page
    for page in PAGES
    if page.name not in GENERATED
    and any(block.is_shell and any(not noted for _, noted in block.lines()) for block in blocks(page))
]


@pytest.fixture(scope="module")
def reader_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder with the recipes, as after cloning; the pages share what they write there."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    return folder


def smaller(arguments: list[str]) -> list[str]:
    for start, more in SMALLER.items():
        if tuple(arguments[: len(start)]) == start:
            given = {word.partition("=")[0] for word in arguments}
            return [*arguments, *(word for word in more if word.partition("=")[0] not in given)]
    return arguments


def run_csr(arguments: list[str]) -> None:
    shown = CliRunner().invoke(app, smaller(arguments), prog_name="csr")
    allowed = {0, STOPPED} if arguments[0] == "audit" else {0, MISSED} if arguments[:2] == ["world", "check"] else {0}
    assert shown.exit_code in allowed, f"csr {' '.join(arguments)}: {shown.exception or shown.stderr}"


def steps(block: Block) -> Iterator[str | list[str]]:
    """Yield what a block does: arguments of csr, or the shell's part between them."""
    shell: list[str] = []
    for line, noted in block.lines():
        ours = line.startswith("csr ")
        if ours or noted:
            if shell:
                yield "\n".join(shell)
                shell = []
            if ours and not noted:
                yield from invocations(line)
        else:
            shell.append(line)
    if shell:
        yield "\n".join(shell)


def run_shell(script: str, reader_folder: Path) -> None:
    command = ["bash", "-euo", "pipefail", "-c", script]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, cwd=reader_folder, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{script}\n{done.stderr}"


def only_on_installing(script: str) -> bool:
    """Check whether a step changes the environment that the tests run in."""
    return script.strip().startswith("source .venv")


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Path, reader_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(reader_folder)
    for block in blocks(page):
        for step in steps(block) if block.is_shell else ():
            if isinstance(step, list):
                if "--install-completion" not in step:
                    run_csr(step)
            elif step.strip() and not only_on_installing(step):
                run_shell(step, reader_folder)


def test_the_python_page_runs_as_it_is_printed(reader_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(reader_folder)
    page = ROOT / "docs" / "python.md"
    ran = 0
    for block in blocks(page):
        if block.is_shell:
            for step in steps(block):
                run_csr(list(step))
        elif block.language == "python":
            exec(compile(block.text, f"{page.name}, block {block.number}", "exec"), {})
            ran += 1
    assert ran == 4
