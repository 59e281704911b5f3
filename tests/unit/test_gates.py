"""Test the gates of a run: its pairs before training, its policy after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from csr_vlm.config.load import resolve
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Reporter, Silent
from csr_vlm.core.records import Finish, Node, NodeStatus
from csr_vlm.method.audit import RESPONSE_BOUNDS
from csr_vlm.pipeline import gates, stages
from csr_vlm.pipeline.loop import align
from csr_vlm.scale.executor import Executor
from csr_vlm.store import files, tables
from csr_vlm.store.run import Run
from tests.unit.builders import REQUIRED, node, prompt

NAMES = tuple(f"prompt-{i}" for i in range(8))
GOOD_METRICS = {"sentences": 4.0, "words": 20.0, "repeats": 0.1, "complete": 1.0, "relevance": 30.0}


def tree(prompt_id: str, iteration: int, cosines: tuple[float, float]) -> list[Node]:
    """Two responses. The first is the likelier one, and lambda is 0, so it is preferred."""
    ends: dict[str, Any] = {
        "status": NodeStatus.FINISHED,
        "finish": Finish.EOS,
        "prompt_id": prompt_id,
        "iteration": iteration,
    }
    return [
        node("0", "A boat.", cosine=cosines[0], logprobs=(-0.1, -0.1), ids=(1, 0), **ends),
        node("1", "A ghost.", cosine=cosines[1], logprobs=(-2.0, -1.0), ids=(2, 0), **ends),
    ]


TRUE, FALSE = (0.4, 0.1), (0.1, 0.4)
"""The cosines of the likelier response and of the other: the prior is right, or wrong."""


class Stages:
    """Replace the stages that need a model by given ledgers and responses; an adapter names its iteration."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        ledgers: list[Any],
        responses: list[dict[str, float]],
        num_responses: int = 8,
    ) -> None:
        self.ledgers, self.responses, self.num_responses = ledgers, responses, num_responses
        self.calls: list[str] = []
        for name in ("generate", "train", "evaluate"):
            monkeypatch.setattr(stages, name, getattr(self, name))
        monkeypatch.setattr(stages, "try_training", lambda *_: None)

    def generate(self, run: Run, iteration: int, reporter: Reporter, executor: Executor) -> None:
        if run.is_done(iteration, "generate"):
            return
        self.calls.append(f"generate {iteration}")
        nodes = [n for name in NAMES for n in tree(name, iteration, self.ledgers[iteration - 1])]
        tables.write_nodes(run.iteration(iteration) / "ledger" / "part-000000.parquet", nodes)
        run.mark_done(iteration, "generate", nodes=len(nodes))

    def train(self, run: Run, iteration: int, reporter: Reporter, executor: Executor) -> None:
        if run.is_done(iteration, "train"):
            return
        self.calls.append(f"train {iteration}")
        files.write_text(run.iteration(iteration) / "adapter" / "weights", f"iteration {iteration}")
        run.mark_done(iteration, "train", log=[], num_pairs=3, reference="ledger", first_loss=0.6931)

    def evaluate(self, run: Run, iteration: int, reporter: Reporter) -> None:
        if run.is_done(iteration, "evaluate"):
            return
        self.calls.append(f"evaluate {iteration}")
        metrics = {
            name: {"value": value, "low": value, "high": value, "n": self.num_responses}
            for name, value in GOOD_METRICS.items()
        }
        for name, value in self.responses[iteration].items():
            metrics[name]["value"] = value
        run.mark_done(iteration, "evaluate", heldout=metrics)


class LogRecorder(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)


def new_run(root: Path, **evaluation: Any) -> Run:
    method = {
        "lambda": 0.0,
        "reward": {"image_score": "cosine", "baseline": "none"},
        "pairs": {"questions": {"per_prompt": 0}},
    }
    run = Run.create(
        root, resolve(REQUIRED | {"preset": "sentences", "iterations": 2, "method": method, "evaluation": evaluation})
    )
    tables.write_prompts(run.prompts_path, [prompt(name) for name in NAMES], 64)
    tables.write_prompts(run.heldout_path, [prompt("held out")], 4)
    run.mark_done(
        0, "prompts", accepted=9, heldout=1, dropped={}, examples=[], sha256=files.sha256_of(run.prompts_path)
    )
    return run


ALL = ["evaluate 0", "generate 1", "train 1", "evaluate 1", "generate 2", "train 2", "evaluate 2"]
COLLAPSED = {"sentences": 4.0 * RESPONSE_BOUNDS["sentences_ratio"].stop * 0.9}


def test_a_good_run_is_finished(tmp_path, monkeypatch):
    work, log = Stages(monkeypatch, [TRUE, TRUE], [{}, {}, {}]), LogRecorder()
    run = new_run(tmp_path)
    align(run, log)
    assert work.calls == ALL
    assert (run.stopped_at, run.final) == (None, 2)
    assert (tmp_path / "adapter" / "weights").read_text() == "iteration 2"
    assert [run.result(n, stage)["verdict"] for n in (1, 2) for stage in ("audit", "gate")] == ["go"] * 4
    assert log.lines == []


def test_bad_pairs_in_the_first_iteration_are_an_error(tmp_path, monkeypatch):
    work = Stages(monkeypatch, [FALSE], [{}])
    run = new_run(tmp_path)
    with pytest.raises(
        CsrError, match=r"these pairs are not worth training on: .*the chosen side suits the image better"
    ) as caught:
        align(run, Silent())
    assert "csr audit" in caught.value.hint
    assert "evaluation.audit=warn" in caught.value.hint
    assert work.calls == ["evaluate 0", "generate 1"], "nothing was trained"
    assert (run.stopped_at, run.final) == (1, 0)
    with pytest.raises(CsrError, match="not worth training on"):
        align(Run.open(tmp_path), Silent())
    assert work.calls == ["evaluate 0", "generate 1"]


def test_bad_pairs_in_a_later_iteration_keep_the_previous_policy(tmp_path, monkeypatch):
    work, log = Stages(monkeypatch, [TRUE, FALSE], [{}, {}]), LogRecorder()
    run = new_run(tmp_path)
    align(run, log)
    assert work.calls == ALL[:5], "iteration 2 was not trained"
    assert (run.stopped_at, run.final) == (2, 1)
    assert (tmp_path / "adapter" / "weights").read_text() == "iteration 1"
    assert any(line.startswith("iteration 2: stopped: the chosen side suits") for line in log.lines)
    assert log.lines[-1] == "the result is iteration 1"
    report = (tmp_path / "report.html").read_text()
    assert "The run stopped before training iteration 2 and returned iteration 1: the chosen side suits" in report
    assert "unfinished" not in report


def test_a_policy_whose_responses_collapse_stops_the_run(tmp_path, monkeypatch):
    work, log = Stages(monkeypatch, [TRUE, TRUE], [{}, {}, COLLAPSED]), LogRecorder()
    run = new_run(tmp_path)
    align(run, log)
    assert work.calls == ALL
    assert (run.stopped_at, run.final) == (2, 1)
    assert (tmp_path / "adapter" / "weights").read_text() == "iteration 1"
    assert run.result(2, "gate")["metrics"]["sentences_ratio"] == pytest.approx(COLLAPSED["sentences"] / 4)
    assert "The run stopped after iteration 2 and returned iteration 1" in (tmp_path / "report.html").read_text()


def test_a_first_policy_whose_responses_collapse_leaves_the_base_model(tmp_path, monkeypatch):
    log = LogRecorder()
    Stages(monkeypatch, [TRUE], [{}, COLLAPSED])
    run = new_run(tmp_path)
    align(run, log)
    assert (run.stopped_at, run.final) == (1, 0)
    assert not (tmp_path / "adapter").exists()
    assert "the result is the base model" in log.lines


def test_too_few_responses_only_warn(tmp_path, monkeypatch):
    work, log = Stages(monkeypatch, [TRUE, TRUE], [{}, {}, COLLAPSED], num_responses=7), LogRecorder()
    run = new_run(tmp_path)
    align(run, log)
    assert work.calls == ALL
    assert (run.stopped_at, run.final) == (None, 2)
    assert run.result(2, "gate")["verdict"] == "warn"
    assert any("iteration 2: warning" in line for line in log.lines)


@pytest.mark.parametrize(("setting", "loud"), [("warn", True), ("off", False)])
def test_a_run_that_may_not_stop_continues(tmp_path, monkeypatch, setting, loud):
    work, log = Stages(monkeypatch, [FALSE, FALSE], [{}, COLLAPSED, COLLAPSED]), LogRecorder()
    run = new_run(tmp_path, audit=setting)
    align(run, log)
    assert work.calls == ALL
    assert (run.stopped_at, run.final) == (None, 2)
    assert run.result(1, "audit")["verdict"] == "stop", "what was found is kept all the same"
    warned = [line for line in log.lines if "warning: the chosen side suits the image better" in line]
    assert len(warned) == (2 if loud else 0)
    assert any("responses collapse" in line for line in log.lines) is loud


@pytest.mark.parametrize("setting", ["stop", "warn", "off"])
def test_stop_rules_hold_whatever_the_metrics_say(tmp_path, setting):
    run = new_run(tmp_path, audit=setting, stop_if=["words < -5"])
    for number, words in ((0, 20), (1, 10)):
        rows = [{"id": name, "text": "", "tallies": {"words": (words, 1)}} for name in NAMES]
        files.write_json(run.evaluation_path(number, "heldout"), {"protocol": {}, "metrics": {}, "rows": rows})
        metrics = {name: {"value": value, "low": value, "high": value, "n": 8} for name, value in GOOD_METRICS.items()}
        run.mark_done(number, "evaluate", heldout=metrics)
    assert gates.gate(run, 1, Silent())
    assert run.result(1, "gate")["verdict"] == "go", "the metrics are good"
    assert "words" in run.result(1, "gate")["reasons"][0]


def test_resuming_does_not_repeat_the_checks(tmp_path, monkeypatch):
    work = Stages(monkeypatch, [TRUE, FALSE], [{}, {}])
    run = new_run(tmp_path)
    align(run, Silent())
    markers = [run.iteration(n) / "done" / f"{stage}.json" for n, stage in ((1, "audit"), (1, "gate"), (2, "audit"))]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in markers]
    # What would now be judged otherwise.
    for number, cosines in ((1, FALSE), (2, TRUE)):
        nodes = [n for name in NAMES for n in tree(name, number, cosines)]
        tables.write_nodes(run.ledger_parts(number)[0], nodes)
    calls = list(work.calls)
    again = Run.open(tmp_path)
    align(again, Silent())
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in markers] == before
    assert work.calls == calls
    assert (again.stopped_at, again.final) == (2, 1)


def test_offline_pairs_have_no_ledger_to_check(tmp_path):
    run = new_run(tmp_path)
    assert not gates.audit(run, 1, Silent())
    assert not run.is_done(1, "audit")


def test_without_heldout_prompts_the_gate_has_no_metrics(tmp_path):
    run = new_run(tmp_path, heldout=0)
    run.mark_done(0, "evaluate")
    run.mark_done(1, "evaluate")
    assert not gates.gate(run, 1, Silent())
    assert run.result(1, "gate")["metrics"] == {}
    assert run.result(1, "gate")["verdict"] == "go"


def test_the_chosen_drop_is_the_mean_of_the_last_quarter_in_nats(tmp_path):
    run = new_run(tmp_path)
    metrics = {name: {"value": value} for name, value in GOOD_METRICS.items()}
    run.mark_done(0, "evaluate", heldout=metrics)
    run.mark_done(1, "evaluate", heldout=metrics)
    rewards = [9.0, 9.0, 9.0, 9.0, 9.0, 9.0, -0.1, -0.3]
    run.mark_done(1, "train", log=[{"loss": 0.6, "rewards/chosen": value} for value in rewards])
    beta = run.config.training.trl["beta"]
    assert gates.response_checks(run, 1)[0]["chosen_drop"] == pytest.approx(0.2 / beta)


@pytest.mark.parametrize("num_responses", [8, 2])
def test_a_policy_that_says_nothing_stops_the_run_with_the_reason(tmp_path, monkeypatch, num_responses):
    """Its relevance is undefined; that is no matter of chance, so few responses do not excuse it."""
    log, mute = LogRecorder(), {"relevance": None, "sentences": 0.0}
    Stages(monkeypatch, [TRUE, TRUE], [{}, {}, mute], num_responses)
    run = new_run(tmp_path)
    align(run, log)
    assert (run.stopped_at, run.final) == (2, 1)
    assert "responses: relevance was 30 and is undefined now" in run.result(2, "gate")["reasons"]
    assert "relevance_gain" not in run.result(2, "gate")["metrics"]
    assert any("stopped: responses: relevance was 30 and is undefined now" in line for line in log.lines)
    assert "relevance was 30 and is undefined now" in (tmp_path / "report.html").read_text()


def test_a_metric_that_the_base_lacks_too_is_not_checked(tmp_path, monkeypatch):
    unrated = {"relevance": None}
    Stages(monkeypatch, [TRUE, TRUE], [unrated, unrated, {}])
    run = new_run(tmp_path)
    align(run, Silent())
    assert run.final == 2
    assert all(check["metric"] != "relevance_gain" for check in run.result(1, "gate")["checks"])


def test_a_value_of_zero_is_not_undefined(tmp_path, monkeypatch):
    Stages(monkeypatch, [TRUE, TRUE], [{"repeats": 0.0}, {"repeats": 0.0}, {"repeats": 0.0}])
    run = new_run(tmp_path)
    align(run, Silent())
    assert run.result(2, "gate")["metrics"]["repeats_gain"] == 0.0
    assert run.final == 2


def test_pairs_whose_relevance_became_undefined_stop_the_run(tmp_path, monkeypatch):
    """Where all cosines are equal, no sentence suits the image and no side suits it better."""
    equal, log = (0.2, 0.2), LogRecorder()
    Stages(monkeypatch, [TRUE, equal], [{}, {}])
    run = new_run(tmp_path / "later")
    align(run, log)
    assert (run.stopped_at, run.final) == (2, 1)
    assert run.result(2, "audit")["reasons"] == ["pairs: relevance_win was 1 in iteration 1 and is undefined now"]
    Stages(monkeypatch, [equal], [{}])
    with pytest.raises(CsrError, match="relevance_win is undefined: in no pair does one side suit the image better"):
        align(new_run(tmp_path / "first"), Silent())


def test_a_rule_about_an_unknown_metric_is_refused_before_any_training(tmp_path, monkeypatch):
    work = Stages(monkeypatch, [TRUE], [{}])
    run = new_run(tmp_path, stop_if=["no such metric < 0"])
    rows = [{"id": name, "text": "", "tallies": {"words": (20, 1)}} for name in NAMES]
    files.write_json(run.evaluation_path(0, "heldout"), {"protocol": {}, "metrics": {}, "rows": rows})
    with pytest.raises(CsrError, match="was not measured") as caught:
        align(run, Silent())
    assert "heldout/words (Words)" in caught.value.hint
    assert work.calls == ["evaluate 0"]
