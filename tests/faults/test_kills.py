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
from tests.faults.harness import ProcessResult, Zygote, tiny_run
from tests.processes import results

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
    operations: int
    """Number of file operations from start to end."""


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
    result = zygote.run(run.root, plan={"do": "count"})
    assert result.code == 0, result.output
    files = results(run.root)
    assert sum("ledger/part-" in name for name in files) == 6
    assert sum("adapter_model" in name for name in files) == 3
    assert len(set(files.values())) == len(files) - 1, "only the last adapter is stored twice"
    return Reference(files, result.seconds, int((folder / "count").read_text()))


def disturbances(reference: Reference, rng: random.Random) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield kills at random times and file operations, half-written files, disk errors and signals."""
    for what in cycle(KINDS):
        if what in signal.Signals.__members__ or what == "instant":
            number = signal.SIGKILL if what == "instant" else signal.Signals[what]
            yield what, {"signals": {number: rng.uniform(0.02, 0.6) * reference.seconds}}
        else:
            yield what, {"plan": {"do": what, "at": rng.randint(1, reference.operations // 2)}}


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
