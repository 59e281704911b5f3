"""Run four processes, some of which die or hang: the results do not change, and the others end."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from csr_vlm.scale.torchrun import TIMEOUT_VARIABLE
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


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_alone(tmp_path_factory.mktemp("alone"))


def parts(run: Run) -> list[Path]:
    return run.ledger_parts(1)


def test_four_processes_give_the_same_ledger_and_pairs(alone: Run, tmp_path: Path) -> None:
    run = another(alone, tmp_path)
    done = finished(*launch(4), "run", run.root, "--quiet")
    assert done.returncode == 0, done.stderr
    assert ledger(run.root) == ledger(alone.root)
    assert run.pairs_path(1).read_bytes() == alone.pairs_path(1).read_bytes()
    assert run.questions_path(1).read_bytes() == alone.questions_path(1).read_bytes()
    assert run.result(1, "pairs")["questions"] > 0
    assert run.result(1, "train")["distribution"] == {"type": "MULTI_CPU", "processes": 4}
    losses = [[entry["loss"] for entry in r.result(1, "train")["log"]] for r in (alone, run)]
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)


def test_a_killed_process_ends_all_and_any_number_resumes(alone: Run, tmp_path: Path) -> None:
    run = another(alone, tmp_path)
    with started(*launch(3), "generate", run.root, "--quiet") as process:
        wait_for(lambda: parts(run), process)
        victim = next(child for child in below(process, "csr_vlm.cli") if child.environ().get("RANK") == "1")
        victim.send_signal(signal.SIGKILL)
        assert process.wait(timeout=120) != 0
    survived = ledger(run.root)
    assert 0 < len(survived) < 8
    assert not run.is_done(1, "generate")
    for processes in (2, 4):
        done = finished(*launch(processes), "generate", run.root, "--iteration", 1, "--quiet")
        assert done.returncode == 0, done.stderr
        assert ledger(run.root) == ledger(alone.root)
    require_every_node_once(run)


def test_a_process_that_hangs_is_named(alone: Run, tmp_path: Path) -> None:
    run = another(alone, tmp_path)
    with started(*launch(2), "generate", run.root, "--quiet", **{TIMEOUT_VARIABLE: "6"}) as process:
        wait_for(lambda: parts(run), process)
        victim = next(child for child in below(process, "csr_vlm.cli") if child.environ().get("RANK") == "1")
        victim.send_signal(signal.SIGSTOP)
        _, stderr = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "error: rank 1 of 2 has sent no heartbeat for 6 s" in stderr
    assert finished(*CSR, "generate", run.root, "--quiet").returncode == 0
    assert ledger(run.root) == ledger(alone.root)


def test_a_second_command_on_the_same_run_is_rejected(alone: Run, tmp_path: Path) -> None:
    run = another(alone, tmp_path)
    with started(*launch(2), "generate", run.root, "--quiet") as process:
        wait_for(lambda: parts(run), process)
        second = finished(*CSR, "generate", run.root, "--quiet")
        assert second.returncode == 1
        assert "is in use by another process" in second.stderr
        assert process.wait(timeout=300) == 0
    assert ledger(run.root) == ledger(alone.root)


def test_training_resumes_after_a_kill(alone: Run, tmp_path: Path) -> None:
    adapters = []
    for kill in (False, True):
        run = another(alone, tmp_path / str(kill))
        assert finished(*launch(2), "generate", run.root, "--quiet").returncode == 0
        assert finished(*CSR, "pairs", run.root).returncode == 0
        if kill:
            with started(*launch(2), "train", run.root, "--quiet") as process:
                wait_for(lambda run=run: (run.iteration(1) / "trainer").exists(), process)
                below(process, "csr_vlm.cli")[0].send_signal(signal.SIGKILL)
                assert process.wait(timeout=120) != 0
            assert not run.is_done(1, "train")
        done = finished(*launch(2), "train", run.root, "--quiet")
        assert done.returncode == 0, done.stderr
        adapters.append((run.iteration(1) / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


def test_scoring_on_three_processes_gives_the_same_ledger(alone: Run, tmp_path: Path) -> None:
    ledgers = []
    for command in (CSR, launch(3)):
        run = another(alone, tmp_path / str(len(ledgers)))
        assert finished(*CSR, "generate", run.root, "--quiet").returncode == 0
        scored = finished(*command, "score", run.root, "--scorer", alone.config.scorer.path, "--name", "again", "-q")
        assert scored.returncode == 0, scored.stderr
        ledgers.append(ledger(run.root))
    assert ledgers[0] == ledgers[1]
    assert ledgers[0] != ledger(alone.root)
