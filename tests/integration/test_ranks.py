"""Compare two processes of ``csr run --gpus 2``, and of torchrun, with one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from csr_vlm.core.memory import COSTS
from csr_vlm.store.run import Run
from tests.processes import CSR, finished, launch, ledger, require_every_node_once, sharing_config

LOSS_TOLERANCE = 2e-5
"""Rounding error after three steps at a high learning rate."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    root = tmp_path_factory.mktemp("ranks")
    config = sharing_config(root)
    made = {}
    for processes in (1, 2):
        made[processes] = Run.create(root / str(processes), config)
        done = finished(*CSR, "run", made[processes].root, "--json", "--quiet", "--gpus", processes)
        assert done.returncode == 0, done.stderr
        # Only the leader prints.
        assert json.loads(done.stdout)["adapter"] == str(made[processes].root / "adapter")
    return made


def test_ledger_and_pairs_are_the_same_bytes(runs: dict[int, Run]) -> None:
    one, two = runs[1], runs[2]
    assert len(ledger(one.root)) == 8
    assert ledger(two.root) == ledger(one.root)
    require_every_node_once(two)
    assert two.pairs_path(1).read_bytes() == one.pairs_path(1).read_bytes()
    for stage in ("generate", "pairs"):
        measured = (*COSTS, "devices", "processes")
        results = [{k: v for k, v in run.result(1, stage).items() if k not in measured} for run in (one, two)]
        assert results[0] == results[1]


def test_training_takes_the_same_steps(runs: dict[int, Run]) -> None:
    one, two = (run.result(1, "train") for run in (runs[1], runs[2]))
    assert one["distribution"] == {"type": "NO", "processes": 1}
    assert two["distribution"] == {"type": "MULTI_CPU", "processes": 2}
    assert len(one["log"]) == len(two["log"]) == 3
    for left, right in zip(one["log"], two["log"], strict=True):
        for name in ("loss", "rewards/margins", "logps/chosen"):
            assert right[name] == pytest.approx(left[name], abs=LOSS_TOLERANCE, rel=LOSS_TOLERANCE)
    # The policy has moved, so the steps are what agrees.
    assert abs(one["log"][2]["rewards/margins"] - one["log"][0]["rewards/margins"]) > 100 * LOSS_TOLERANCE
    weights = [load_file(run.root / "adapter" / "adapter_model.safetensors") for run in (runs[1], runs[2])]
    assert weights[0].keys() == weights[1].keys()
    largest = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
    moved = max(float(value.abs().max()) for name, value in weights[0].items() if "lora_B" in name)
    assert largest < 0.05 * moved


def test_no_temporary_files_are_left(runs: dict[int, Run]) -> None:
    names = {path.name for path in runs[2].root.rglob("*")}
    assert not {name for name in names if name.endswith((".tmp", ".pt", ".bin"))}
    assert "trainer" not in names


def test_a_process_without_a_pair_in_a_step_changes_nothing(runs: dict[int, Run], tmp_path: Path) -> None:
    odd = sharing_config(runs[1].root.parent, training={"trl": {"per_device_train_batch_size": 1}})
    run = Run.create(tmp_path / "odd", odd)
    (run.root / "prompts.parquet").write_bytes(runs[1].prompts_path.read_bytes())
    for name in ("iteration-0", "iteration-1"):
        for path in (runs[1].root / name).rglob("*"):
            if path.is_file() and path.name not in ("train.json", "evaluate.json", "gate.json"):
                (run.root / path.relative_to(runs[1].root)).parent.mkdir(parents=True, exist_ok=True)
                (run.root / path.relative_to(runs[1].root)).write_bytes(path.read_bytes())
    done = finished(*launch(2), "train", run.root, "--quiet")
    assert done.returncode == 0, done.stderr
    alone = Run.create(tmp_path / "alone", odd)
    shutil.copytree(run.root, alone.root, dirs_exist_ok=True)
    (alone.iteration(1) / "done" / "train.json").unlink()
    assert finished(*CSR, "train", alone.root, "--quiet").returncode == 0
    losses = [[entry["loss"] for entry in r.result(1, "train")["log"]] for r in (run, alone)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)
