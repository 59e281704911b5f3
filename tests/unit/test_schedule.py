"""Test the schedule: the steps of whole, offline, stopped and partial runs, and the expected time left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from csr_vlm.config.load import resolve
from csr_vlm.core.progress import Silent
from csr_vlm.pipeline import gates, loop, stages
from csr_vlm.pipeline.schedule import Step, StepState, schedule, seconds_left
from csr_vlm.pipeline.status import Watcher
from csr_vlm.report.provenance import provenance
from csr_vlm.store import files, tables
from csr_vlm.store.run import Run
from csr_vlm.store.stage_names import ITERATION_STAGES, LABELS, LEDGER_STAGES, TIMED_STAGES
from tests.unit.builders import REQUIRED, node

SEARCHED = ["generate", "pairs", "audit", "train", "evaluate", "gate"]
OFFLINE = ["pairs", "train", "evaluate", "gate"]


def planned(root: Path, **settings: Any) -> Run:
    return Run.create(root, resolve(REQUIRED | {"iterations": 2} | settings))


def stages_by_iteration(steps: list[Step]) -> dict[int, list[str]]:
    return {
        t: [step.stage for step in steps if step.iteration == t] for t in sorted({step.iteration for step in steps})
    }


def test_a_new_run_has_every_stage_to_do(tmp_path: Path) -> None:
    steps = schedule(planned(tmp_path))
    assert stages_by_iteration(steps) == {0: ["prompts", "evaluate"], 1: SEARCHED, 2: SEARCHED}
    assert {step.state for step in steps} == {StepState.TO_DO}
    assert [step.iteration for step in steps] == sorted(step.iteration for step in steps)
    assert seconds_left(steps) is None, "nothing has been timed"


def test_offline_pairs_replace_the_search_and_the_audit_of_the_first_iteration(tmp_path: Path) -> None:
    offline = {"data": {"prompts": "prompts.jsonl", "pairs": "pairs.jsonl"}}
    assert stages_by_iteration(schedule(planned(tmp_path / "two", **offline))) == {
        0: ["prompts", "evaluate"],
        1: OFFLINE,
        2: SEARCHED,
    }
    run = planned(tmp_path / "one", **offline, iterations=1)
    for number, stage, seconds in ((0, "prompts", None), (0, "evaluate", 5.0), (1, "pairs", 2.0), (1, "train", 60.0)):
        run.mark_done(number, stage, **({} if seconds is None else {"seconds": seconds}))
    steps = schedule(run)
    assert seconds_left(steps) == 5.0, "only the evaluation is left: no search is expected"
    with run.locked():
        status = Watcher(run).read()
    assert status.left == 5.0
    assert status.stages == {0: {"evaluate": 5.0}, 1: {"pairs": 2.0, "train": 60.0}}


def test_a_stopped_run_has_only_the_steps_that_were_done(tmp_path: Path) -> None:
    run = planned(tmp_path, iterations=3)
    for number, stage in ((0, "prompts"), (0, "evaluate"), (1, "generate"), (1, "pairs")):
        run.mark_done(number, stage)
    run.mark_done(1, "audit", stopped=True)
    steps = schedule(run)
    assert stages_by_iteration(steps) == {0: ["prompts", "evaluate"], 1: ["generate", "pairs", "audit"]}
    assert {step.state for step in steps} == {StepState.DONE}
    assert seconds_left(steps) == 0.0
    status = Watcher(run).read()
    assert status.state == "finished"
    assert list(status.stages) == [0, 1, 2, 3]


def test_without_evaluation_the_steps_are_the_same_and_take_no_time(tmp_path: Path) -> None:
    """The stage still writes its marker, so that the gate and the manifest find it."""
    run = planned(tmp_path, iterations=1, evaluation={"heldout": 0})
    for path in (run.prompts_path, run.heldout_path):
        tables.write_prompts(path, [], 4)
    run.mark_done(0, "prompts", accepted=4, heldout=0, sha256=files.sha256_of(run.prompts_path))
    stages.evaluate(run, 0, Silent())
    assert run.result(0, "evaluate")["seconds"] < 1
    for stage, seconds in (("generate", 2.0), ("pairs", 1.0), ("train", 60.0)):
        run.mark_done(1, stage, seconds=seconds)
    steps = schedule(run)
    assert stages_by_iteration(steps) == {0: ["prompts", "evaluate"], 1: SEARCHED}
    left = seconds_left(steps)
    assert left is not None
    assert left < 1


def test_a_search_that_was_interrupted_is_expected_to_take_the_rest_of_its_time(tmp_path: Path) -> None:
    """Iteration 1 took 100 s for 4 parts; iteration 2 has one part, so 75 s are left of its search."""
    run = planned(tmp_path, generation={"prompts_per_part": 2})
    run.mark_done(0, "prompts", accepted=8, heldout=1)
    run.mark_done(0, "evaluate", seconds=3.0)
    for stage, seconds in (("generate", 100.0), ("pairs", 1.0), ("train", 40.0), ("evaluate", 5.0)):
        run.mark_done(1, stage, seconds=seconds)
    run.mark_done(1, "audit", stopped=False)
    run.mark_done(1, "gate", stopped=False)
    tables.write_nodes(run.iteration(2) / "ledger" / "part-000000.parquet", [node("0", "A boat.", cosine=0.3)])
    steps = schedule(run)
    search = next(step for step in steps if (step.iteration, step.stage) == (2, "generate"))
    assert (search.state, search.seconds, search.note) == (StepState.BEGUN, 75.0, "1 of 4 parts")
    assert seconds_left(steps) == 75 + 1 + 40 + 4, "the evaluation as long as the mean of the two before"
    assert seconds_left(steps, current=10.0) == 10 + 1 + 40 + 4, "a measured rate replaces the expectation"


def test_the_loop_does_the_steps_of_the_schedule_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[int, str]] = []

    def record(stage: str) -> Any:
        return lambda run, iteration, *_: done.append((iteration, stage))

    monkeypatch.setattr(stages, "check_inputs", lambda run, reporter: done.append((0, "prompts")))
    for stage, module, name in (
        ("generate", stages, "generate"),
        ("pairs", stages, "make_pairs"),
        ("audit", gates, "audit"),
        ("train", stages, "train"),
        ("evaluate", stages, "evaluate"),
        ("gate", gates, "gate"),
    ):
        monkeypatch.setattr(module, name, record(stage))
    for name in ("export", "report", "try_training"):
        monkeypatch.setattr(stages, name, lambda *_: None)
    run = planned(tmp_path)
    loop.align(run, Silent())
    assert done == [(step.iteration, step.stage) for step in schedule(run)]


def test_the_report_shows_the_timed_stages_of_the_schedule(tmp_path: Path) -> None:
    run = planned(tmp_path, iterations=1)
    run.mark_done(1, "train", seconds=61.0)
    ((name, durations),) = provenance(run).timings
    assert name == "Iteration 1"
    assert dict(zip(TIMED_STAGES, durations, strict=True))["train"] == "1 min 1 s"


def test_every_stage_has_a_label() -> None:
    assert set(ITERATION_STAGES) | {"prompts"} == LABELS.keys()
    assert set(ITERATION_STAGES) >= LEDGER_STAGES | set(TIMED_STAGES)


def test_a_step_is_dumped_as_json(tmp_path: Path) -> None:
    step = schedule(planned(tmp_path))[0]
    path = tmp_path / "step.json"
    files.write_json(path, step.dump())
    assert files.read_json(path) == {
        "iteration": 0,
        "stage": "prompts",
        "state": "to do",
        "seconds": None,
        "note": "",
    }
