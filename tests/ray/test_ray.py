"""Run work items with Ray Data: same bytes, no item lost or repeated, also after a kill."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from csr_vlm.store.run import Run
from tests.processes import (
    CSR,
    another,
    below,
    finished,
    launch,
    ledger,
    require_every_node_once,
    run_alone,
    started,
    wait_for,
)

pytest.importorskip("ray", reason="Ray has an environment of its own: make test-ray")
ACTOR = "MapWorker"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_alone(tmp_path_factory.mktemp("alone"))


def test_a_whole_run_has_the_same_bytes(alone: Run, tmp_path: Path) -> None:
    run = another(alone, tmp_path)
    done = finished(*CSR, "run", run.root, "--ray", 2, "--quiet")
    assert done.returncode == 0, done.stderr
    assert ledger(run.root) == ledger(alone.root)
    assert run.pairs_path(1).read_bytes() == alone.pairs_path(1).read_bytes()
    # Training runs in the driver, so it is the same too.
    weights = "adapter/adapter_model.safetensors"
    assert (run.root / weights).read_bytes() == (alone.root / weights).read_bytes()
    assert run.result(1, "generate")["statuses"] == alone.result(1, "generate")["statuses"]


def test_a_killed_actor_loses_no_item(alone: Run, tmp_path: Path) -> None:
    run = another(alone, tmp_path)
    with started(*CSR, "generate", run.root, "--ray", 2, "--quiet") as process:
        wait_for(lambda: run.ledger_parts(1), process)
        victim = below(process, ACTOR)[0]
        victim.send_signal(signal.SIGKILL)
        _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert ledger(run.root) == ledger(alone.root)
    require_every_node_once(run)


def test_a_crashed_driver_loses_no_item(alone: Run, tmp_path: Path) -> None:
    run = another(alone, tmp_path)
    with started(*CSR, "generate", run.root, "--ray", 2, "--quiet") as process:
        wait_for(lambda: run.ledger_parts(1), process)
        actors = below(process, ACTOR)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    _, alive = psutil.wait_procs(actors, timeout=60)
    assert alive == []  # no actor outlives its driver
    survived = ledger(run.root)
    assert 0 < len(survived) < 8
    assert survived.items() <= ledger(alone.root).items()
    before = {name: (run.root / name).stat().st_mtime_ns for name in survived}
    time.sleep(0.01)
    done = finished(*CSR, "generate", run.root, "--ray", 3, "--quiet")
    assert done.returncode == 0, done.stderr
    assert ledger(run.root) == ledger(alone.root)
    require_every_node_once(run)
    # Finished parts were not written again.
    assert {name: (run.root / name).stat().st_mtime_ns for name in before} == before


def test_scoring_gives_the_same_bytes(alone: Run, tmp_path: Path) -> None:
    ledgers = []
    for number, options in enumerate(((), ("--ray", 2))):
        root = tmp_path / str(number)
        shutil.copytree(alone.root, root)
        scored = finished(*CSR, "score", root, "--scorer", alone.config.scorer.path, "--name", "again", "-q", *options)
        assert scored.returncode == 0, scored.stderr
        ledgers.append(ledger(root))
    assert ledgers[0] == ledgers[1]
    assert ledgers[0] != ledger(alone.root)


def test_errors_of_actors_and_of_the_cluster_take_one_line(alone: Run, tmp_path: Path) -> None:
    run = another(alone, tmp_path)
    missing = finished(*CSR, "score", alone.root, "--scorer", "./nowhere", "--name", "x", "-q", "--ray", 1)
    assert missing.returncode == 1
    errors = [line for line in missing.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: the scorer ./nowhere cannot be loaded"]
    assert "why: there is no such directory" in missing.stderr
    many = finished(*CSR, "generate", run.root, "--ray", 10_000, "--quiet", RAY_ADDRESS="127.0.0.1:1")
    assert many.returncode == 1
    assert "error: the Ray cluster cannot be reached" in many.stderr
    both = finished(*launch(2), "generate", run.root, "--ray", 2, "--quiet")
    assert "error: --ray cannot be combined with torchrun or accelerate launch" in both.stderr
