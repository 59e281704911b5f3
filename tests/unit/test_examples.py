"""Test that the cluster examples contain valid commands and existing files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from csr_vlm.cli.app import app
from csr_vlm.config.load import load_config
from csr_vlm.training.distribution import pairs_per_step

ROOT = Path(__file__).parents[2]
SLURM = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))
KUBERNETES = sorted((ROOT / "examples" / "kubernetes").glob("*.yaml"))
SKYPILOT = sorted((ROOT / "examples" / "skypilot").glob("*.yaml"))
DOCKERFILE = ROOT / "docker" / "Dockerfile"
ACCELERATE = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
FOR_MANY = sorted((ROOT / "recipes").glob("*8gpu.yaml"))


def shell_commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command of a script, comments and continuations resolved."""
    for line in text.replace("\\\n", " ").splitlines():
        if not line.lstrip().startswith("#"):
            yield shlex.split(line)


def csr_arguments(words: Sequence[str]) -> list[str] | None:
    """Return what follows ``csr``, also where a launcher starts it as a module; None for another command."""
    for at, word in enumerate(words):
        if word == "csr":
            return list(words[at + 1 :])
        if word == "-m" and words[at + 1 : at + 2] == ["csr_vlm.cli"]:
            return list(words[at + 2 :])
    return None


def parse(arguments: list[str]) -> dict[str, Any]:
    """Let the command line parse a command without running it; return what it understood."""
    filled = [re.sub(r"^\$\{?ITERATION\}?$", "1", word) for word in arguments]
    command: Any = typer.main.get_command(app)
    context = command.context_class(command)
    while hasattr(command, "get_command"):
        name, command, filled = command.resolve_command(context, filled)
        context = command.context_class(command, parent=context, info_name=name)
    command.parse_args(context, filled)
    return context.params


def kubernetes_commands(document: dict[str, Any]) -> Iterator[list[str]]:
    if document["kind"] == "RayJob":
        yield shlex.split(document["spec"]["entrypoint"])
        return
    for container in document["spec"]["template"]["spec"]["containers"]:
        yield [*container["command"], *container["args"]]


def require_recipe(params: dict[str, Any]) -> None:
    target = str(params["target"])
    if target.endswith(".yaml"):
        load_config(ROOT / target.removeprefix("/shared/"))


@pytest.mark.parametrize("path", SLURM, ids=lambda path: path.stem)
def test_slurm_examples_hold_commands_that_parse(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#!/bin/bash\n")
    found = [arguments for words in shell_commands(text) if (arguments := csr_arguments(words)) is not None]
    assert len(found) >= 2
    for arguments in found:
        require_recipe(parse(arguments))
    for config in re.findall(r"--config_file (\S+)", text):
        assert (ROOT / config).is_file()
    # Submitting from elsewhere would not find them.
    assert f"sbatch {path.relative_to(ROOT)}" in text


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.stem)
def test_kubernetes_examples_hold_commands_that_parse(path: Path) -> None:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    (arguments,) = [csr_arguments(words) for words in kubernetes_commands(document)]
    assert arguments is not None
    params = parse(arguments)
    require_recipe(params)
    if document["kind"] == "RayJob":
        cluster = document["spec"]["rayClusterSpec"]
        gpus = sum(group["replicas"] for group in cluster["workerGroupSpecs"])
        assert params["ray"] == gpus
        assert cluster["rayVersion"] == re.search(r"^ray==(\S+)", constraints(), re.MULTILINE)[1]  # type: ignore[index]
        assert yaml.safe_load(document["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_ADDRESS"] == "auto"


@pytest.mark.parametrize("path", SKYPILOT, ids=lambda path: path.stem)
def test_skypilot_examples_hold_commands_that_parse(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    task = yaml.safe_load(text)
    assert {"resources", "setup", "run"} <= task.keys()
    found = [arguments for words in shell_commands(task["run"]) if (arguments := csr_arguments(words)) is not None]
    assert len(found) >= 2
    for arguments in found:
        parse(arguments)
    assert "-c constraints.txt" in task["setup"]
    assert f"sky launch {path.relative_to(ROOT)}" in text


def test_the_image_installs_from_the_lock_and_runs_the_demo() -> None:
    lines = DOCKERFILE.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert {name for name, _ in steps} <= {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD"}
    for sources in (rest.split()[:-1] for name, rest in steps if name == "COPY"):
        assert all((ROOT / source).exists() for source in sources)
    commands = [rest for name, rest in steps if name == "RUN"]
    assert all("-c constraints.txt" in command for command in commands if command.startswith("pip install"))
    names = [name for name, _ in steps]
    assert names.index("USER") < max(index for index, name in enumerate(names) if name == "RUN")
    (demo,) = [shlex.split(part) for command in commands for part in command.split("&&") if " demo " in part]
    assert parse(csr_arguments(demo) or [])["prompts"] == 8


def constraints() -> str:
    return (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_a_wrong_command_would_be_noticed() -> None:
    parse(["run", "recipes/quickstart.yaml", "--ray", "2"])
    with pytest.raises(Exception, match="No such option"):
        parse(["run", "recipes/quickstart.yaml", "--rays", "2"])
    with pytest.raises(Exception, match="No such command"):
        parse(["generates", "recipes/quickstart.yaml"])
    with pytest.raises(Exception, match="valid integer"):
        parse(["generate", "recipes/quickstart.yaml", "--iteration", "none"])


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    config = load_config_from_file(str(path))
    expected = {
        "ddp": DistributedType.MULTI_GPU,
        "fsdp2": DistributedType.FSDP,
        "zero2": DistributedType.DEEPSPEED,
        "zero3": DistributedType.DEEPSPEED,
    }
    assert config.distributed_type is expected[path.stem]
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
    if path.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
        assert config.deepspeed_config["zero3_init_flag"] is False
    assert str(path.relative_to(ROOT)) in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FOR_MANY, ids=lambda path: path.stem)
def test_recipes_for_eight_gpus_take_steps_of_32_pairs(path: Path) -> None:
    assert pairs_per_step(load_config(path).training.trl) == 32
