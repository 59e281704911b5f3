"""Test that a run that is killed, stopped or out of disk space ends with the bytes of an undisturbed run.

``make test-faults`` disturbs runs more than a hundred times; the ordinary tests a few times.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest

from csr_vlm.store.run import Run
from tests.faults.harness import tiny_run
from tests.processes import ProcessResult, Zygote, results

FULL = os.environ.get("CSR_FAULTS") == "all"
KILLS = 100 if FULL else 3
OTHERS = 20 if FULL else 2
KINDS = (
    *("tear", "ENOSPC", "instant", "SIGTERM", "kill", "instant", "tear", "EIO", "kill"),
    *("instant", "tear", "SIGINT", "kill", "instant", "EDQUOT", "tear", "kill"),
)
NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


@dataclass(frozen=True)
class Reference:
    """Hold the results of an undisturbed run."""

    results: dict[str, bytes]
    seconds: float
    operations: list[str]
    """Name and path of each operation from start to end."""


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def reference(zygote: Zygote, folder: Path) -> Reference:
    run = tiny_run(folder / "undisturbed")
    result = zygote.run(run.root, plan={"do": "record"})
    assert result.code == 0, result.output
    files = results(run.root)
    assert sum("ledger/part-" in name for name in files) == 6
    assert sum("adapter_model" in name for name in files) == 3
    assert len(set(files.values())) == len(files) - 1, "only the last adapter is stored twice"
    return Reference(files, result.seconds, (folder / "operations").read_text().splitlines())


def disturbances(reference: Reference, rng: random.Random) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield kills at random times and file operations, half-written files, disk errors and signals."""
    for what in cycle(KINDS):
        if what in signal.Signals.__members__ or what == "instant":
            number = signal.SIGKILL if what == "instant" else signal.Signals[what]
            yield what, {"signals": {number: rng.uniform(0.02, 0.6) * reference.seconds}}
        else:
            yield what, {"plan": {"do": what, "at": rng.randint(1, len(reference.operations) // 2)}}


def check_end(what: str, result: ProcessResult) -> bool:
    """Check how a disturbed run ended; return whether it was disturbed before it finished."""
    assert "Traceback" not in result.output, result.output
    if result.code == 0:
        return False
    if what in ("kill", "tear", "instant"):
        assert result.code == -signal.SIGKILL, result.output
    elif what.startswith("SIG"):
        assert result.code == 128 + signal.Signals[what], result.output
        assert f"stopped by {what}" in result.output
        assert "Resume with: csr run " in result.output
    else:
        assert result.code == 1, result.output
        expected = "cannot be written\nwhy: Input/output error" if what == "EIO" else "the disk is full"
        assert expected in result.output, result.output
        assert "run the same command again" in result.output
    return True


def test_no_disturbance_changes_the_result(zygote: Zygote, reference: Reference, folder: Path) -> None:
    reached: Counter[str] = Counter()
    where: Counter[str] = Counter()
    finished = 0
    run = tiny_run(folder / "disturbed-0")

    def compare(run: Run) -> None:
        assert results(run.root) == reference.results
        assert not list(run.root.rglob("*.tmp"))

    for what, request in islice(disturbances(reference, random.Random(7)), 4 * (KILLS + OTHERS)):
        result = zygote.run(run.root, **request)
        if check_end(what, result):
            reached[what] += 1
            where[unfinished(run)] += 1
        else:
            compare(run)
            shutil.rmtree(run.root)
            finished += 1
            run = tiny_run(folder / f"disturbed-{finished}")
        kills = sum(reached[name] for name in ("kill", "tear", "instant"))
        if kills >= KILLS and reached.total() - kills >= OTHERS:
            break
    assert zygote.run(run.root).code == 0
    compare(run)
    print(f"reached {dict(reached)} during {dict(where)}; {finished + 1} runs finished")
    assert kills >= KILLS
    assert reached.total() - kills >= OTHERS


def at_training(folder: Path, name: str) -> Run:
    """Copy the undisturbed run to a folder as it was before its last training."""
    run = tiny_run(folder / name)
    shutil.copytree(
        folder / "undisturbed", run.root, ignore=shutil.ignore_patterns("config.yaml", "adapter"), dirs_exist_ok=True
    )
    shutil.copytree(folder / "undisturbed" / "iteration-1" / "adapter", run.iteration(1) / "adapter")
    for stage in ("train", "evaluate", "gate"):
        (run.iteration(2) / "done" / f"{stage}.json").unlink()
    return run


def test_training_killed_between_steps_and_inside_checkpoints_ends_with_the_same_bytes(
    zygote: Zygote, reference: Reference, folder: Path
) -> None:
    """Kill before a step, in half-written files and while the checkpoint before is deleted; fill the disk."""
    run = at_training(folder, "training")
    for what, within, at, checkpoints in (
        ("kill", "update", 3, {2}),
        ("ENOSPC", "checkpoint-3/optimizer.pt", 1, {2, 3}),
        ("tear", "checkpoint-3/optimizer.pt", 1, {2, 3}),
        ("kill", "checkpoint-2/complete.json", 1, {2, 3}),
        ("kill", "checkpoint-4", 2, {2, 3, 4}),
    ):
        result = zygote.run(run.root, plan={"do": what, "within": within, "at": at})
        assert check_end(what, result), (what, within)
        left = run.trainer_path(2).glob("checkpoint-*")
        assert {int(path.name.rpartition("-")[2]) for path in left} == checkpoints, (what, within)
    assert zygote.run(run.root, plan={"do": "record"}).code == 0
    steps = [line for line in (folder / "operations").read_text().splitlines() if str(run.root / "update") in line]
    assert len(steps) == 2, "two of five steps were left"
    assert results(run.root) == reference.results


@pytest.mark.skipif(not FULL, reason="make test-faults")
def test_a_kill_at_any_step_and_at_any_operation_of_a_checkpoint_changes_nothing(
    zygote: Zygote, reference: Reference, folder: Path
) -> None:
    last = [line for line in reference.operations if "iteration-2/trainer/checkpoint-3" in line]
    plans = [("kill", "update", at) for at in range(1, 6)]
    plans += [("kill", "trainer/checkpoint-3", at) for at in range(1, len(last) + 1)]
    tearable = [at for at, line in enumerate(last, start=1) if line.startswith(("fsync", "replace"))]
    plans += [("tear", "trainer/checkpoint-3", at) for at in tearable]
    for number, (what, within, at) in enumerate(plans):
        run = at_training(folder, f"training-{number}")
        result = zygote.run(run.root, plan={"do": what, "within": within, "at": at})
        assert result.code == -signal.SIGKILL, result.output
        assert zygote.run(run.root).code == 0
        assert results(run.root) == reference.results, (what, within, at)
        shutil.rmtree(run.root)
    print(f"{len(plans)} kills inside training, {len(tearable)} of them with a truncated file")


def unfinished(run: Run) -> str:
    """Name the first stage that has no marker."""
    for number in range(run.config.iterations + 1):
        for stage in ("prompts", "evaluate") if number == 0 else ("generate", "pairs", "train", "evaluate", "gate"):
            if not run.is_done(number, stage):
                return f"{number}/{stage}"
    return "export"


def test_a_file_size_limit_is_reported_as_a_full_disk(zygote: Zygote, reference: Reference, folder: Path) -> None:
    """Exceed the limit in Arrow's writer, whose error message differs from the system's."""
    run = tiny_run(folder / "limited")
    result = zygote.run(run.root, largest_file=4_000)
    assert check_end("ENOSPC", result)
    assert ".parquet" in result.output


@pytest.mark.skipif(not FULL, reason="make test-faults")
def test_a_slow_disk_changes_nothing(zygote: Zygote, reference: Reference, folder: Path) -> None:
    run = tiny_run(folder / "slow")
    assert zygote.run(run.root, plan={"do": "slow", "seconds": 0.05}).code == 0
    assert results(run.root) == reference.results


def can_mount() -> bool:
    done = subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    return done.returncode == 0


@pytest.mark.skipif(not FULL, reason="make test-faults")
def test_a_full_disk_is_reported_and_the_run_resumes_once_there_is_space(folder: Path, reference: Reference) -> None:
    if shutil.which("unshare") is None or not can_mount():
        pytest.skip("no file system can be mounted here")
    disk = folder / "disk"
    disk.mkdir()
    with Zygote(*NAMESPACE) as zygote:
        zygote.shell(f"mount -t tmpfs -o size=64k none {disk}")
        made = tiny_run(folder / "config-only")
        zygote.shell(
            f"mkdir {disk}/run && sed '$d;s#{made.root}#{disk}/run#' {made.root}/config.yaml > {disk}/run/config.yaml"
        )
        for size in (64, 128, 256, 384):
            zygote.shell(f"mount -o remount,size={size}k {disk}")
            result = zygote.run(disk / "run")
            assert check_end("ENOSPC", result), f"{size} kB were enough"
        zygote.shell(f"mount -o remount,size=64m {disk}")
        assert zygote.run(disk / "run").code == 0
        zygote.shell(f"cp -r {disk}/run {folder}/rescued")
    assert results(folder / "rescued") == reference.results
