"""Test the layout of the code: import order, lazy imports of heavy libraries, short functions."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "csr_vlm"
ARCHITECTURE = Path(__file__).parents[2] / "docs" / "architecture.md"
NEVER = {("report", "world"), ("evaluation", "world")}
"""A report knows metrics, not worlds; neither does an evaluation."""


def layers_of(page: str) -> list[list[str]]:
    """Read the import order from the architecture page: ``a | b`` are layers side by side."""
    block = page.split("<!-- import order -->")[1].split("```")[1]
    return [[name.strip() for name in line.split("|")] for line in block.strip().splitlines()[1:]]


LAYERS = layers_of(ARCHITECTURE.read_text(encoding="utf-8"))
LEVEL = {part: level for level, layer in enumerate(LAYERS) for part in layer}
HEAVY = {"torch", "transformers", "trl", "vllm", "ray", "peft", "accelerate", "datasets"}
MOST_LINES = 80
MODULES = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield the full names that a module of ``package`` imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(path: str, source: str) -> list[str]:
    """List the imports of a module that do not go down."""
    *folders, name = path.removesuffix(".py").split("/")
    part = folders[0] if folders else name
    if part == "__init__":
        part = "api"  # the package itself offers what the Python interface has, and only when it is asked for
    if part not in LEVEL:
        return [f"{path}: {part} has no layer"]
    found = []
    for target in imported(ast.parse(source), ".".join(["csr_vlm", *folders])):
        root, _, rest = target.partition(".")
        other = rest.partition(".")[0]
        if root != "csr_vlm" or not other or other == part:
            continue
        if other not in LEVEL or LEVEL[other] >= LEVEL[part] or (part, other) in NEVER:
            found.append(f"{path} imports {target}")
    return found


def weights_only(call: ast.Call) -> bool:
    """Check whether a call passes the literal ``weights_only=True``."""
    return any(
        word.arg == "weights_only" and isinstance(word.value, ast.Constant) and word.value.value is True
        for word in call.keywords
    )


def dangers(path: str, source: str) -> list[str]:
    """List calls and imports that run code found in data."""
    tree, found = ast.parse(source), []
    safe = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call) and weights_only(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}:
            found.append(f"{path}:{node.lineno} {node.func.id}")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) == ("torch", "load") and node not in safe:
                found.append(f"{path}:{node.lineno} torch.load")
            if (node.value.id, node.attr) in {("builtins", "eval"), ("builtins", "exec")}:
                found.append(f"{path}:{node.lineno} {node.attr}")
    for name in imported(tree, "csr_vlm"):
        if name.partition(".")[0] in {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"}:
            found.append(f"{path} {name}")
        if name == "torch.load":
            found.append(f"{path} {name}")
    return found


def long_functions(path: str, source: str) -> list[str]:
    return [
        f"{path}:{node.lineno} {node.name}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MOST_LINES
    ]


def test_only_the_interface_lies_loose_in_the_package():
    assert {path for path in MODULES if "/" not in path} == {"__init__.py", "api.py"}
    assert {path.split("/")[0] for path in MODULES if "/" in path} <= LEVEL.keys()


def test_no_two_modules_share_a_name_except_a_verb_and_what_it_runs():
    places: dict[str, list[str]] = {}
    for path in MODULES:
        folder, _, name = path.rpartition("/")
        if name not in {"__init__.py", "__main__.py"}:
            places.setdefault(name, []).append(folder)
    shared = {name: folders for name, folders in places.items() if len(folders) > 1}
    assert all(len(folders) == 2 and "cli" in folders for folders in shared.values()), shared


def test_there_is_something_to_look_at():
    assert {"core/records.py", "method/search.py", "store/run.py", "pipeline/loop.py"} <= MODULES.keys()


@pytest.mark.parametrize("path", sorted(MODULES))
def test_imports_go_down(path):
    assert violations(path, MODULES[path]) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("method/new.py", "from csr_vlm.store.run import Run"),
        ("method/new.py", "import csr_vlm.pipeline.stages"),
        ("method/new.py", "from csr_vlm import stages"),
        ("method/new.py", "def f():\n    from csr_vlm.models.policy import Policy"),
        ("method/new.py", "from ..data import prompts"),
        ("method/new.py", "from .. import cli"),
        ("store/new.py", "from csr_vlm.data.prompts import read_prompts"),
        ("generation/new.py", "from csr_vlm.training.dpo import train"),
        ("scoring/new.py", "from csr_vlm.training.dpo import train"),
        ("world/new.py", "from csr_vlm.report.html import write_report"),
        ("report/new.py", "from csr_vlm.world.scenes import HARBOUR"),
        ("evaluation/new.py", "from csr_vlm.world.scenes import HARBOUR"),
        ("pipeline/new.py", "from csr_vlm.api import Recipe"),
        ("config/new.py", "from csr_vlm.method.reward import text_score"),
        ("core/new.py", "from csr_vlm.config.schema import RunConfig"),
        ("unheard_of.py", "import json"),
    ],
)
def test_the_import_rule_would_notice(path, source):
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "method/new.py",
            "from csr_vlm.config.schema import MethodConfig\nimport json\nfrom csr_vlm.method.reward import x",
        ),
        ("method/new.py", "from . import reward\nfrom ..core.records import Node"),
        ("training/new.py", "from csr_vlm.models.policy import Policy"),
        ("evaluation/new.py", "from csr_vlm.scoring.scorer import Scorer"),
        ("pipeline/new.py", "from csr_vlm.report.html import write_report"),
        ("cli/new.py", "from csr_vlm.pipeline import loop, stages"),
    ],
)
def test_the_import_rule_allows(path, source):
    assert violations(path, source) == []


@pytest.mark.parametrize("module", ["csr_vlm", "csr_vlm.config.load", "csr_vlm.cli"])
def test_light_modules_load_no_heavy_library(module):
    assert loaded_by(f"import {module}") == []


def test_a_configuration_error_loads_no_heavy_library():
    statements = (
        "from csr_vlm.config.load import load_config\nfrom csr_vlm.core.errors import CsrError\n"
        "try:\n    load_config(None, ['method.lamda=1'])\nexcept CsrError: pass"
    )
    assert loaded_by(statements) == []


def test_a_heavy_library_would_be_noticed():
    assert loaded_by("import sys, types\nsys.modules['torch'] = types.ModuleType('torch')") == ["torch"]


def loaded_by(statements: str) -> list[str]:
    script = f"{statements}\nimport sys\nprint(*sorted(set(sys.modules) & {HEAVY!r}))"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("path", sorted(MODULES))
def test_no_function_is_long(path):
    assert long_functions(path, MODULES[path]) == []


def test_a_long_function_would_be_noticed():
    body = "\n".join("    x = 1" for _ in range(MOST_LINES))
    assert long_functions("new.py", f"class A:\n  def f():\n{body}") == ["new.py:2 f"]
    assert long_functions("new.py", "def f():\n" + body.removesuffix("\n    x = 1")) == []


@pytest.mark.parametrize("path", sorted(MODULES))
def test_nothing_runs_code_found_in_data(path):
    assert dangers(path, MODULES[path]) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec('1')",
        "import pickle",
        "from pickle import load",
        "torch.load('f')",
        "torch.load('f', weights_only=False)",
        "torch.load('f', weights_only=safe)",
        "load = torch.load",
        "from torch import load",
    ],
)
def test_dangers_would_be_noticed(source):
    assert dangers("new.py", source)


@pytest.mark.parametrize(
    "source", ["model.eval()\ntorch.save(x)\nimport json", "torch.load('f', weights_only=True, mmap=True)"]
)
def test_these_are_no_dangers(source):
    assert dangers("new.py", source) == []
