"""Test full disks, signals, damaged files and non-finite numbers, each in isolation."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from csr_vlm.cli import signals
from csr_vlm.cli.console import printable
from csr_vlm.config.load import load_config
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Silent
from csr_vlm.core.records import Candidate, Finish
from csr_vlm.data.formats.webdataset import rows as tar_rows
from csr_vlm.method.search import search
from csr_vlm.pipeline import stages
from csr_vlm.store import files, ledger, tables
from csr_vlm.store.run import Run
from tests.faults.badinput import bomb, tar_header
from tests.faults.runs import PROMPTS, write_run
from tests.unit.builders import REQUIRED, method, prompt


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of files that are flushed and renamed, in order."""
    seen: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flush(handle: int) -> None:
        seen.append(f"flush {Path(f'/proc/self/fd/{handle}').readlink().name}")
        fsync(handle)

    def rename(old: Path, new: Path) -> None:
        seen.append(f"rename to {Path(new).name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    return seen


def test_content_is_flushed_before_the_rename_and_the_rename_before_the_return(
    tmp_path: Path, calls: list[str]
) -> None:
    files.write_text(tmp_path / "new" / "a.txt", "x")
    temporary = f".a.txt.{files._HOST}.{os.getpid()}.tmp"
    assert calls == [f"flush {tmp_path.name}", f"flush {temporary}", "rename to a.txt", "flush new"]


def test_a_directory_is_flushed_with_all_its_files(tmp_path: Path, calls: list[str]) -> None:
    def fill(folder: Path) -> None:
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "weights").write_text("w")

    files.replace_directory(tmp_path / "adapter", fill)
    *inside, renamed, last = calls
    assert sorted(inside) == [f"flush .adapter.{files._HOST}.{os.getpid()}.tmp", "flush sub", "flush weights"]
    assert (renamed, last) == ("rename to adapter", f"flush {tmp_path.name}")


@pytest.mark.parametrize(
    "raised",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EFBIG, "File too large"),
    ],
)
def test_the_error_for_a_full_disk_names_the_available_space(tmp_path: Path, raised: Exception) -> None:
    def write(temporary: Path) -> None:
        temporary.write_bytes(b"x" * 1000)
        raise raised

    with pytest.raises(CsrError, match="the disk is full") as caught:
        files.write_atomically(tmp_path / "part.parquet", write)
    free = shutil.disk_usage(tmp_path).free / 1e6
    reported = float(caught.value.message.split("more than the ")[1].split(" MB")[0].replace(",", ""))
    assert reported == pytest.approx(free, rel=0.2)
    assert "run the same command again" in caught.value.hint
    assert list(tmp_path.iterdir()) == [], "nothing half-written is left"


def test_disk_errors_are_explained_and_other_errors_passed_on(tmp_path: Path) -> None:
    def fail(error: Exception) -> Callable[[Path], None]:
        def write(temporary: Path) -> None:
            raise error

        return write

    with pytest.raises(CsrError, match="cannot be written: Input/output error"):
        files.write_atomically(tmp_path / "a", fail(OSError(errno.EIO, "x")))
    with pytest.raises(ZeroDivisionError):
        files.write_atomically(tmp_path / "a", fail(ZeroDivisionError()))
    with pytest.raises(FileNotFoundError), files.disk_errors(tmp_path, of_disk_only=True):
        raise FileNotFoundError(errno.ENOENT, "elsewhere")


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        files.open_regular(tmp_path / "pipe")


def test_a_changed_marker_is_rejected_but_one_without_a_digest_is_accepted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    marker = run.iteration(1) / "done" / "generate.json"
    content = json.loads(marker.read_text())
    assert run.result(1, "generate")["nodes"] == 8 * PROMPTS
    marker.write_text(json.dumps(content | {"nodes": 3}))
    with pytest.raises(CsrError, match="changed after it was written"):
        run.result(1, "generate")
    del content["digest"]
    marker.write_text(json.dumps(content))
    assert run.result(1, "generate")["nodes"] == 8 * PROMPTS
    with pytest.raises(CsrError, match=r"generate.json has no key 'nothing'"):
        run.result(1, "generate")["nothing"]


def test_an_incomplete_ledger_is_rejected(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    first, second, _ = run.ledger_parts(1)
    contents = first.read_bytes(), second.read_bytes()
    assert len(list(ledger.trees(run, 1))) == PROMPTS - 1
    second.unlink()
    with pytest.raises(CsrError, match="is missing; it held 32 rows"):
        list(ledger.trees(run, 1))
    second.write_bytes(contents[0])
    for changed in (contents[0], contents[1][:300]):
        second.write_bytes(changed)
        with pytest.raises(CsrError, match="was changed after it was written; it held 32 rows"):
            list(ledger.trees(run, 1))
    second.write_bytes(contents[1])
    assert len(list(ledger.trees(run, 1))) == PROMPTS - 1


def test_prompts_that_changed_after_the_check_are_rejected(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    stages.check_inputs(run, Silent())
    tables.write_prompts(run.prompts_path, [prompt("x")], 4)
    with pytest.raises(CsrError, match="was changed after the inputs were checked"):
        stages.check_inputs(run, Silent())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_log_probability_stops_the_search_and_names_the_prompt(value: float) -> None:
    def propose(requests: object) -> list[list[Candidate]]:
        return [[Candidate((1,), (-0.5,), " A.", Finish.DELIMITER), Candidate((2,), (value,), " B.", Finish.DELIMITER)]]

    def score(items: list[object]) -> list[dict[str, float]]:
        return [{"clip": 0.2} for _ in items]

    with pytest.raises(CsrError, match=f"prompt it: the policy gives a token the log-probability {value}"):
        search([prompt("it")], propose, score, method(), iteration=1, seed=0, scorer="clip")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_stops_after_the_current_work_item(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number, done, before = signal.Signals[name], [], signal.getsignal(signal.Signals[name])

    def work() -> None:
        with signals.stoppable(Silent(), tmp_path) as reporter, reporter.stage("work", 3) as progress:
            for item in range(3):
                if item == 1:
                    os.kill(os.getpid(), number)
                done.append(item)
                progress.advance(1)

    with pytest.raises(SystemExit) as left:
        work()
    assert left.value.code == 128 + number
    assert done == [0, 1], "the item in hand is finished"
    assert f"Resume with: csr run {tmp_path}" in capsys.readouterr().err
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("twice", [True, False])
def test_a_second_signal_or_a_timeout_stops_immediately(
    twice: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "PATIENCE", 30 if twice else 1)
    started = time.monotonic()

    def work() -> None:
        with signals.stoppable(Silent(), tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
            if twice:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)

    with pytest.raises(signals.Stopped) as left:
        work()
    assert left.value.code == 143
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    "text", [bomb(30), "a: &a [*a]", "[" * 50_000, f"seed: {'9' * 6000}", "seed: 2020-99-99", "x" * 300_000]
)
def test_hostile_yaml_is_rejected_quickly(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(CsrError) as caught:
        load_config(tmp_path / "recipe.yaml")
    assert time.process_time() - started < 2
    assert len(str(caught.value)) < 1000


def test_small_aliases_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"{json.dumps(REQUIRED)[:-1]}, iterations: &two 2, seed: *two}}")
    assert load_config(tmp_path / "recipe.yaml").seed == 2


def test_a_tar_header_with_a_false_size_is_rejected_quickly(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(
        tar_header(b"a.jpg", b"\xff" * 12, b"0") + tar_header(b"b.jpg", b"\x80" + b"\x07" * 11, b"0")
    )
    started = time.process_time()
    assert [str(row) for _, row in tar_rows(tmp_path / "a.tar")] == ["damaged tar file"]
    assert time.process_time() - started < 1


def test_control_characters_are_escaped_in_printed_text() -> None:
    assert printable("a\x1b[2Jb\u202ec\ud800d\n\té🦊") == "a\\x1b[2Jb\\u202ec\\ud800d\n\té🦊"


def test_the_synthetic_run_reads_like_a_real_one(tmp_path: Path) -> None:
    """Check that the runs from which bad input is derived are valid."""
    run = write_run(tmp_path / "run")
    assert Run.open(run.root).result(1, "pairs")["pairs"] > 0
