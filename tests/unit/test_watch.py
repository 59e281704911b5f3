"""Test the progress file of a process, and the status that ``csr watch`` reads from it."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from csr_vlm.cli.app import app
from csr_vlm.cli.sanitize import one_line
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Silent
from csr_vlm.core.records import Prompt
from csr_vlm.pipeline.status import Watcher
from csr_vlm.store import files, progress_file
from csr_vlm.store.progress_file import read_progress, record_progress
from csr_vlm.store.run import Run
from tests.unit.test_report import add_evaluation, add_pairs, add_training, metrics, new_run, row

ESCAPE = "\x1b[2J\x1b]0;owned\x07"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    # Opened again, since a new run that fails before it finishes a stage is deleted.
    return Run.open(new_run(tmp_path / "run", iterations=2).root)


def finish(run: Run, *iterations: int) -> None:
    for number in iterations:
        if number:
            add_training(run, number)
        add_evaluation(run, number, metrics(0.5 - number / 10), [row(0, text=f"There is a boat. {ESCAPE}")])


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["watch", *map(str, arguments)])


def test_a_run_without_a_process_is_waiting(run: Run) -> None:
    status = Watcher(run).read()
    assert (status.state, status.current, status.left, status.samples) == ("waiting", None, None, ())


def test_a_running_run_shows_its_stage_rate_and_log(run: Run) -> None:
    finish(run, 0)
    with (
        run.locked(),
        record_progress(run.root, Silent()) as reporter,
        reporter.stage("iteration 1: searching", 10) as progress,
    ):
        reporter.log("a notice")
        time.sleep(0.3)
        progress.advance(4)
        progress.log_metrics({"loss": 0.5})
        reporter.write()
        status = Watcher(run).read()
    assert status.state == "running"
    current = status.current
    assert current is not None
    assert (current.title, current.done, current.total) == ("iteration 1: searching", 4, 10)
    assert current.numbers == {"loss": 0.5}
    assert 0 < current.rate <= 4 / 0.3
    assert 0 < current.left <= 6 / current.rate
    assert status.said == ["a notice"]
    assert list(status.metrics) == [0]
    assert status.samples[0].source == "base model, world"


def test_a_clock_that_is_set_back_shows_no_negative_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    with run.locked(), record_progress(run.root, Silent()) as reporter, reporter.stage("searching", 10) as progress:
        time.sleep(0.1)
        progress.advance(4)
        monkeypatch.setattr(time, "time", lambda: now - 3600)
        before = Watcher(run).read()
        reporter.write()
        after = Watcher(run).read()
    for status in (before, after):
        assert status.state == "running"
        assert status.quiet_for == 0
        assert status.current is not None
        assert status.current.seconds >= 0
    assert after.current is not None
    assert after.current.left is not None
    assert after.current.left <= 6 / after.current.rate, "an hour back adds no hour"


def test_the_rate_ignores_items_that_a_resumed_stage_skips(run: Run) -> None:
    with record_progress(run.root, Silent()) as reporter, reporter.stage("searching", 1000) as progress:
        progress.advance(900)
        for _ in range(20):
            time.sleep(0.005)
            progress.advance(1)
        reporter.write()
        assert read_progress(run.root).stage.rate < 250, "20 at most 200 a second, not 900 at once"


@pytest.mark.parametrize(
    ("error", "state", "why"),
    [
        (CsrError("no space\nleft", "make room"), "failed", "no space"),
        (KeyboardInterrupt(), "interrupted", ""),
        (MemoryError(), "failed", "MemoryError"),
    ],
)
def test_the_status_keeps_how_the_process_ended(run: Run, error: BaseException, state: str, why: str) -> None:
    with (
        pytest.raises(type(error)),
        run.locked(),
        record_progress(run.root, Silent()) as reporter,
        reporter.stage("training", 5),
    ):
        raise error
    status = Watcher(run).read()
    assert (status.state, status.why) == (state, why)
    assert status.current is not None, "and the stage that was interrupted"
    assert status.current.title == "training"


def test_a_killed_process_is_gone(run: Run) -> None:
    with record_progress(run.root, Silent()) as reporter, reporter.stage("training", 5):
        kept = files.read_json(run.root / "progress.json")
    files.write_json(run.root / "progress.json", kept)
    status = Watcher(run).read()
    assert (status.state, status.why) == ("gone", "the process exited unexpectedly")


def test_the_progress_file_of_a_dead_process_is_ignored(run: Run) -> None:
    with record_progress(run.root, Silent()) as reporter, reporter.stage("training", 5):
        kept = files.read_json(run.root / "progress.json")
    for changes in ({"pid": 2**22 + 1}, {"state": "failed"}):
        files.write_json(run.root / "progress.json", kept | changes)
        with run.locked():
            status = Watcher(run).read()
        assert (status.state, status.current, status.said) == ("running", None, ())
    files.write_json(run.root / "progress.json", kept | {"pid": 2**22 + 1, "host": "another machine"})
    with run.locked():
        assert Watcher(run).read().current.title == "training"


def test_a_finished_run_is_running_only_while_it_is_locked(run: Run) -> None:
    finish(run, 0, 1, 2)
    assert Watcher(run).read().state == "finished"
    with run.locked(), record_progress(run.root, Silent()):
        assert Watcher(run).read().state == "running"
    assert Watcher(run).read().state == "finished"


def test_the_time_left_is_the_sum_of_expected_stage_durations(run: Run) -> None:
    """Base evaluated in 1.5 s, iteration 1: search 2, pairs 1, training 61, evaluation 1.5; iteration 2 just began."""
    with run.locked(), record_progress(run.root, Silent()):
        finish(run, 0)
        assert Watcher(run).read().left is None, "no training was timed yet"
        prompts = [Prompt("p", "none.png", "What?")]
        add_pairs(run, 1, prompts, "A.", "B.")
        run.mark_done(1, "pairs", **run.result(1, "pairs"), seconds=1.0)
        finish(run, 1)
        assert Watcher(run).read().left == pytest.approx(2 + 1 + 61 + 1.5)


def test_samples_come_from_the_newest_ledger_part(run: Run) -> None:
    finish(run, 0)
    add_pairs(run, 1, [Prompt(f"p{number}", "none.png", "What?") for number in range(5)], "A boat.", "A fish.")
    samples = Watcher(run).read().samples
    assert [sample.prompt_id for sample in samples] == ["p2", "p3", "p4"]
    found = {(sample.text, sample.source) for sample in samples}
    assert found == {("A boat.", "base model, best of its search")}


def test_progress_is_written_at_most_every_two_seconds(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[float] = []
    monkeypatch.setattr(progress_file.files, "write_json", lambda path, value: written.append(time.monotonic()))
    with record_progress(run.root, Silent()) as reporter, reporter.stage("searching", 5000) as progress:
        for _ in range(5000):
            progress.advance(1)
    assert len(written) <= 5, "at the ends of the work and of the stage, and hardly between them"


def test_a_full_disk_does_not_stop_the_work(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def full(handle: int) -> None:
        tried.append(handle)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with record_progress(run.root, Silent()) as reporter, reporter.stage("searching", 5) as progress:
        progress.advance(5)
    assert tried, "it did try"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', '{"stage": null, "new": 1}'])
def test_progress_that_does_not_read_is_none(run: Run, text: str) -> None:
    (run.root / "progress.json").write_text(text)
    assert read_progress(run.root) is None


def test_checking_the_lock_does_not_keep_a_run_from_starting(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csr_vlm.store.lock._CHECK_SECONDS", 5.0)
    check = FileLock(run.root / ".lock", thread_local=False)
    check.acquire()
    threading.Timer(0.06, check.release).start()
    assert not run.in_use(), "two may check at once"
    monkeypatch.undo()
    check.acquire()
    threading.Timer(0.06, check.release).start()
    with run.locked():
        assert run.in_use()


def test_control_characters_are_escaped() -> None:
    assert one_line(f"a{ESCAPE}\nb\u202ec") == r"a\x1b[2J\x1b]0;owned\x07 b\u202ec"
    assert one_line("Größe 猫") == "Größe 猫"


def test_once_shows_the_status_and_exits(run: Run) -> None:
    finish(run, 0, 1)
    shown = invoke(run.root, "--once")
    assert shown.exit_code == 0
    assert "CHAIR_S" in shown.output
    assert "There is a boat." in shown.output
    assert "\x1b" not in shown.output
    found = json.loads(invoke(run.root, "--once", "--json").stdout)
    assert found["state"] == "waiting"
    assert found["metrics"]["1"]["chair_s"]["value"] == 0.4


def test_without_a_terminal_it_prints_lines(run: Run) -> None:
    finish(run, 0, 1, 2)
    shown = invoke(run.root)
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert lines[0].endswith(" finished")
    named = [line.partition(" ")[2].partition(":")[0] for line in lines[1:]]
    assert named == ["base model", "iteration 1", "iteration 2"]
    assert json.loads(invoke(run.root, "--json").stdout)["state"] == "finished"


def test_it_ends_with_the_run_and_shows_the_error(run: Run) -> None:
    with pytest.raises(CsrError), run.locked(), record_progress(run.root, Silent()):
        raise CsrError(f"broken {ESCAPE}")
    shown = invoke(run.root, "--interval", 0.2)
    assert shown.exit_code == 1
    assert "failed, broken" in shown.output
    assert "\x1b" not in shown.output
    assert f"hint: csr run {run.root} resumes the run" in shown.output


def test_it_follows_until_the_end(run: Run) -> None:
    """Watch a run that finishes while it is watched."""
    lock = run.locked()
    lock.__enter__()

    def end() -> None:
        finish(run, 0, 1, 2)
        lock.__exit__(None, None, None)

    threading.Timer(0.3, end).start()
    shown = invoke(run.root, "--interval", 0.2)
    assert shown.exit_code == 0
    states = [line.split()[1] for line in shown.stdout.splitlines()]
    assert states[0] == "running"
    assert "finished" in states


def test_ctrl_c_exits_without_a_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Watcher) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Watcher, "read", interrupt)
    shown = invoke(run.root)
    assert shown.exit_code == 130
    assert "Traceback" not in shown.output
    assert "stopped watching; csr watch" in shown.output
