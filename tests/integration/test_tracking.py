"""Test what is logged to experiment trackers, and that a resumed run logs nothing twice, with a tracker in memory."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from csr_vlm.config.schema import TrackingConfig
from csr_vlm.pipeline import tracking
from csr_vlm.pipeline.tracking import Tracking, finished_iterations, iteration_values, training_values
from csr_vlm.store.run import Run


class Memory:
    """Keep what is logged."""

    def __init__(self, run_id: str | None) -> None:
        self.run_id = run_id or "new"
        self.iterations: list[int] = []
        self.steps: list[int] = []
        self.reports: list[Path] = []

    def log_iteration(self, iteration: int, values: Mapping[str, float]) -> None:
        self.iterations.append(iteration)

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append(step)

    def finish(self, report: Path, examples: Sequence[Any], iteration: int) -> None:
        self.reports.append(report)

    def close(self) -> None:
        pass


@pytest.fixture
def run(short_run: Run, tmp_path: Path) -> Run:
    config = short_run.config.model_copy(update={"tracking": TrackingConfig(to=("wandb", "mlflow"))})
    return Run.create(shutil.copytree(short_run.root, tmp_path / "run"), config)


def test_every_number_of_an_iteration_is_logged(run: Run) -> None:
    assert finished_iterations(run) == [0, 1]
    values = iteration_values(run, 1)
    audit, gate = run.result(1, "audit")["metrics"], run.result(1, "gate")["metrics"]
    assert {f"audit/{name}" for name in audit} | {f"gate/{name}" for name in gate} <= values.keys()
    assert values["audit/claim_agreement/stop"] < values["audit/claim_agreement/warn"]
    heldout = run.result(1, "evaluate")["heldout"]["words"]
    assert (values["heldout/words"], values["heldout/words/low"]) == (heldout["value"], heldout["low"])
    assert values["pairs/pairs"] == run.result(1, "pairs")["pairs"]
    assert values["seconds/train"] > 0
    assert 0.05 < values["memory_gb/train"] < 50
    assert values["generate/tokens"] > values["generate/nodes"] > 0
    ((step, entry),) = [(step, entry) for step, entry in training_values(run, 1) if "train/loss" in entry]
    assert (step, "train/step" in entry) == (1, False)
    assert list(training_values(run, 0)) == []


def test_a_resumed_run_logs_nothing_twice(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, Memory]] = []

    def open_memory(name: str, _run: Run, run_id: str | None) -> Memory:
        opened.append((name, Memory(run_id)))
        return opened[-1][1]

    monkeypatch.setattr(tracking, "open_service", open_memory)
    report = run.root / "report.html"
    first = Tracking(run, pytest.fail)
    first.log_iterations()
    assert [(name, memory.iterations, memory.steps) for name, memory in opened] == [
        ("wandb", [0, 1], [1]),
        ("mlflow", [0, 1], [1]),
    ]
    opened.clear()
    for _ in range(2):  # the second time, there is nothing left to do
        resumed = Tracking(run, pytest.fail)
        resumed.log_iterations()
        resumed.finish(report)
    assert [(memory.run_id, memory.iterations, memory.reports) for _, memory in opened] == 2 * [("new", [], [report])]


def test_a_run_killed_after_its_tracker_was_opened_goes_on_in_the_same_one(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Memory] = []

    def open_memory(_name: str, _run: Run, run_id: str | None) -> Memory:
        opened.append(Memory(run_id or f"begun {len(opened)}"))
        return opened[-1]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tracking, "open_service", open_memory)
    monkeypatch.setattr(Memory, "log_iteration", killed)
    with pytest.raises(KeyboardInterrupt):
        Tracking(run, pytest.fail).log_iterations()
    monkeypatch.setattr(Memory, "log_iteration", lambda *_: None)
    Tracking(run, pytest.fail).log_iterations()
    assert [memory.run_id for memory in opened] == ["begun 0", "begun 0", "begun 2"]


def test_a_tracker_that_fails_is_left_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, messages = Memory(None), []

    def open_or_fail(name: str, _run: Run, _run_id: str | None) -> Memory:
        if name == "wandb":
            raise RuntimeError("no network")
        return memory

    monkeypatch.setattr(tracking, "open_service", open_or_fail)
    tracked = Tracking(run, messages.append)
    tracked.log_iterations()
    tracked.finish(run.root / "report.html")
    assert messages == ["warning: wandb failed and is left out: no network"]
    assert memory.iterations == [0, 1]
    assert len(memory.reports) == 1
