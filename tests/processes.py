"""Execute runs with several processes, and read the results that must not depend on their number."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from csr_vlm.config.schema import RunConfig
from csr_vlm.store import tables
from csr_vlm.store.run import Run
from tests.integration.conftest import small_config

CSR = (sys.executable, "-m", "csr_vlm.cli")
PART_OF_A_SECOND = 0.02


def sharing_config(directory: Path, **changes: object) -> RunConfig:
    """Short trees of sixteen pictures in eight work items, and three full steps of DPO proper."""
    return small_config(
        directory,
        **{
            "iterations": 1,
            "method": {"search": {"max_sentences": 2}, "pairs": {"require_complete": False}},
            "evaluation": {"heldout": 0},
            "generation": {"prompts_per_part": 2},
            # Means over the tokens of a batch, such as sft, depend on how batches are cut; DPO's own loss does not.
            "training": {
                "trl": {
                    "per_device_train_batch_size": 4,
                    "learning_rate": 1e-3,
                    "max_steps": 3,
                    "loss_type": ["sigmoid"],
                    "loss_weights": [1.0],
                }
            },
            **changes,
        },
    )


def run_alone(directory: Path) -> Run:
    """Execute a run of :func:`sharing_config` with one process, as the reference."""
    run = Run.create(directory / "run", sharing_config(directory))
    assert finished(*CSR, "run", run.root, "--quiet").returncode == 0
    return run


def another(alone: Run, directory: Path) -> Run:
    """Create the same run without executing it."""
    return Run.create(directory / "run", alone.config)


def launch(processes: int) -> tuple[str, ...]:
    """Return the command prefix that runs a verb with torchrun."""
    return (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "csr_vlm.cli")


@contextmanager
def started(*command: object, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Start a command with one thread per process; kill it and its descendants at the end."""
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def finished(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    with started(*command, **environment) as process:
        out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, f"it ended before it could be disturbed: {process.communicate()[1]}"
        time.sleep(PART_OF_A_SECOND)


def below(process: subprocess.Popen[str], word: str) -> list[psutil.Process]:
    """List the descendants of a process whose command lines contain a word."""
    return [
        child for child in psutil.Process(process.pid).children(recursive=True) if word in " ".join(child.cmdline())
    ]


def ledger(root: Path) -> dict[str, bytes]:
    """Map the name of each ledger part of all iterations to its bytes."""
    return {str(part.relative_to(root)): part.read_bytes() for part in sorted(root.rglob("part-*.parquet"))}


def results(root: Path) -> dict[str, bytes]:
    """Map the name of each file that must not depend on disturbances of a run to its bytes."""
    kept = (
        *("part-*.parquet", "pairs.parquet", "questions.parquet", "prompts.parquet", "heldout.parquet"),
        "adapter_model.safetensors",
    )
    return {str(p.relative_to(root)): p.read_bytes() for name in kept for p in sorted(root.rglob(name))}


def require_every_node_once(run: Run) -> None:
    nodes = [node for part in run.ledger_parts(1) for node in tables.read_nodes(part)]
    keys = [(node.prompt_id, node.node_id) for node in nodes]
    assert len(set(keys)) == len(keys) == run.result(1, "generate")["nodes"]
    assert {key[0] for key in keys} == {prompt.prompt_id for prompt in run.prompts()}
