"""Test whole runs with vLLM, and that a killed run leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from csr_vlm.config.load import resolve
from csr_vlm.config.schema import ModelConfig, RunConfig
from csr_vlm.core.progress import Silent
from csr_vlm.pipeline.loop import align
from csr_vlm.store.run import Run
from csr_vlm.world.demo import demo_config
from tests.vllm.conftest import ENGINE

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def config(llava: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Configure one iteration of the demo, on fewer prompts and scenes."""
    base = demo_config(tmp_path_factory.mktemp("demo"), seed=0, num_prompts=96, num_scenes=200)
    changes = {"iterations": 1, "model": llava.model_dump(), "generation": {**ENGINE, "prompts_per_part": 48}}
    return resolve(base.dump() | changes)


def test_an_iteration_through_vllm_lowers_chair(config: RunConfig, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", config)
    align(run, Silent())
    training = run.result(1, "train")
    assert training["reference"] == "ledger"
    assert training["reference_difference"] < 1e-4
    before, after = (run.result(iteration, "evaluate")["world"] for iteration in (0, 1))
    chair = [metrics["chair_s"]["value"] for metrics in (before, after)]
    print(f"\nCHAIR_S {chair[0]:.3f} -> {chair[1]:.3f}, reference within {training['reference_difference']:.2g} nats")
    assert chair[1] < chair[0]
    assert not psutil.Process().children(recursive=True)


def session(leader: int) -> Iterator[psutil.Process]:
    """Yield the processes of a session, whether or not they are children of its leader."""
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except (psutil.NoSuchProcess, ProcessLookupError):
            pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_a_killed_run(config: RunConfig, tmp_path: Path, number: signal.Signals) -> None:
    recipe = tmp_path / "recipe.yaml"
    small = {**config.dump()["generation"], "prompts_per_part": 4}
    recipe.write_text(yaml.safe_dump(config.dump() | {"generation": small, "evaluation": {"heldout": 0}}))
    run = tmp_path / "run"
    command = [sys.executable, "-m", "csr_vlm.cli", "run", str(recipe), "--out", str(run), "--quiet"]
    started = subprocess.Popen(command, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while not list(run.glob("iteration-1/ledger/part-*")):
            assert started.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        os.kill(started.pid, number)
        started.wait(60)
        deadline = time.monotonic() + 15
        while (remaining := list(session(started.pid))) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert remaining == []
        assert not (run / "iteration-1" / "pairs.parquet").exists()
    finally:
        for process in session(started.pid):
            process.kill()
