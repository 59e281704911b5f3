"""Compare FSDP2 and DeepSpeed on CPUs with DDP on the same pairs."""

from __future__ import annotations

import os
import shutil
import sys
from importlib import util
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from csr_vlm.store.run import Run
from tests.processes import CSR, finished, launch, sharing_config

ROOT = Path(__file__).parents[2]
AS_IF_GPU = str(ROOT / "tests" / "scale" / "as_if_gpu.py")
FSDP2 = {
    f"FSDP_{key.removeprefix('fsdp_').upper()}": str(value)
    for key, value in yaml.safe_load((ROOT / "recipes" / "accelerate" / "fsdp2.yaml").read_text(encoding="utf-8"))[
        "fsdp_config"
    ].items()
}
"""Environment that ``accelerate launch`` sets for the shipped configuration."""


@pytest.fixture(scope="module")
def paired(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a run with pairs and no trained policy. With use_cpu, accelerate would ignore FSDP and DeepSpeed."""
    root = tmp_path_factory.mktemp("paired")
    config = sharing_config(root)
    trl = {**config.training.trl, "use_cpu": False}
    run = Run.create(
        root / "run", config.model_copy(update={"training": config.training.model_copy(update={"trl": trl})})
    )
    assert finished(*CSR, "generate", run.root, "--quiet").returncode == 0
    assert finished(*CSR, "pairs", run.root).returncode == 0
    return run


def copy_of(run: Run, tmp_path: Path, **trl: object) -> Run:
    shutil.copytree(run.root, tmp_path / "run")
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    settings["training"]["trl"] |= trl
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    return Run.open(tmp_path / "run")


@pytest.fixture(scope="module")
def by_ddp(paired: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = copy_of(paired, tmp_path_factory.mktemp("ddp"), use_cpu=True)
    done = finished(*launch(2), "train", run.root, "--quiet")
    assert done.returncode == 0, done.stderr
    assert run.result(1, "train")["distribution"] == {"type": "MULTI_CPU", "processes": 2}
    return run


def require_equal_training(run: Run, other: Run, tolerance: float) -> None:
    left, right = (r.result(1, "train")["log"] for r in (other, run))
    assert [entry["loss"] for entry in right] == pytest.approx([entry["loss"] for entry in left], abs=tolerance)
    assert left[0]["loss"] != left[-1]["loss"]
    weights = [load_file(r.iteration(1) / "adapter" / "adapter_model.safetensors") for r in (other, run)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name].float(), value.float(), atol=10 * tolerance, rtol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="simulates a GPU")
def test_fsdp2_trains_like_ddp(paired: Run, by_ddp: Run, tmp_path: Path) -> None:
    run = copy_of(paired, tmp_path)
    command = (*launch(2)[:-2], AS_IF_GPU)
    done = finished(*command, "train", run.root, "--quiet", ACCELERATE_USE_FSDP="true", **FSDP2)
    assert done.returncode == 0, done.stderr
    result = run.result(1, "train")
    assert result["distribution"] == {"type": "FSDP", "processes": 2}
    assert result["packing_obstacle"] is None
    require_equal_training(run, by_ddp, 1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests machines without a GPU")
def test_fsdp_that_accelerate_replaces_is_rejected(paired: Run, tmp_path: Path) -> None:
    run = copy_of(paired, tmp_path, use_cpu=True)
    done = finished(*launch(2), "train", run.root, "--quiet", ACCELERATE_USE_FSDP="true", **FSDP2)
    assert done.returncode != 0
    assert "error: FSDP over 2 processes was requested, but accelerate set up MULTI_CPU over 2" in done.stderr
    assert not run.is_done(1, "train")


@pytest.mark.skipif(torch.cuda.is_available(), reason="simulates a GPU")
@pytest.mark.skipif(util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_like_ddp(paired: Run, by_ddp: Run, tmp_path: Path, stage: int) -> None:
    run = copy_of(paired, tmp_path)
    configuration = ROOT / "recipes" / "accelerate" / f"zero{stage}.yaml"
    done = finished(
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", configuration),
        *("--num_processes", 2, "--main_process_port", 29520 + stage, "--mixed_precision", "no"),
        *(AS_IF_GPU, "train", run.root, "--quiet"),
        DS_ACCELERATOR="cpu",
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    )
    assert done.returncode == 0, done.stderr
    assert run.result(1, "train")["distribution"] == {"type": "DEEPSPEED", "processes": 2}
    require_equal_training(run, by_ddp, 2e-5)
