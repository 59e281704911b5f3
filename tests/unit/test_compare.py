"""Test comparisons of stored evaluations, stop rules, and the gate that stops a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from csr_vlm.cli import console
from csr_vlm.cli.app import app
from csr_vlm.config.load import resolve
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Silent
from csr_vlm.evaluation.compare import (
    Comparison,
    EvaluatedPolicy,
    compare,
    named_metrics,
    parse_rule,
    triggered_rules,
)
from csr_vlm.evaluation.metrics import METRICS, POPE_METRICS, metric_spec
from csr_vlm.evaluation.statistics import paired_difference, pooled
from csr_vlm.pipeline import gates, stages
from csr_vlm.report.html import render
from csr_vlm.store import files
from csr_vlm.store.run import Run
from tests.unit.builders import REQUIRED

# Per scene: hallucinated mentions and mentions, objects recalled and objects present.
BASE = [(1, 3, 2, 2), (0, 2, 2, 2), (2, 4, 2, 2), (1, 2, 1, 2)]
BETTER = [(0, 2, 2, 2), (0, 2, 2, 2), (1, 3, 2, 2), (0, 1, 1, 2)]
SILENT = [(0, 1, 1, 2), (0, 1, 1, 2), (0, 0, 0, 2), (0, 1, 1, 2)]


def document(scenes: list[tuple[int, int, int, int]], **protocol: Any) -> dict[str, Any]:
    rows = [
        {
            "id": f"scene-{number}",
            "text": "",
            "hallucinated": ["boat"] * false,
            "relevance": None,
            "tallies": {
                "chair_s": (int(false > 0), 1),
                "chair_i": (false, mentions),
                "recall": (recalled, present),
            },
        }
        for number, (false, mentions, recalled, present) in enumerate(scenes)
    ]
    return {"protocol": {"world": "harbour", "seed": 1} | protocol, "metrics": {}, "rows": rows}


def new_run(root: Path, *measured: dict[str, Any], **evaluation: Any) -> Run:
    """Create a trained run with the given evaluations of its base model and iterations."""
    iterations = max(len(measured) - 1, 1)
    run = Run.create(
        root, resolve(REQUIRED | {"iterations": iterations, "evaluation": {"world": {"num_scenes": 4}, **evaluation}})
    )
    for number, document in enumerate(measured):
        files.write_json(run.evaluation_path(number, "world"), document)
        pooling = pooled([row.get("tallies", {}) for row in document["rows"]])
        run.mark_done(number, "evaluate", world={name: metric.dump() for name, metric in pooling.items()})
        if number:
            adapter = run.adapter_path(number)
            assert adapter is not None
            files.write_text(adapter / "weights", f"iteration {number}")
            run.mark_done(number, "train")
    return run


def test_differences_by_hand(tmp_path):
    run = new_run(tmp_path, document(BASE), document(BETTER))
    (found,) = compare(EvaluatedPolicy(run, 0), EvaluatedPolicy(run, 1))
    assert found.evaluation == "world"
    # CHAIR_S 3/4 to 1/4, CHAIR_I 4/11 to 1/8, recall 7/8 both times.
    assert found.metrics["chair_s"].value == pytest.approx(-0.5)
    assert found.metrics["chair_s"].p == pytest.approx(0.5), "two scenes changed, both one way: 2 / 2^2"
    assert found.metrics["chair_i"].value == pytest.approx(1 / 8 - 4 / 11)
    assert found.metrics["recall"].value == 0.0
    assert found.metrics["recall"].p == 1.0
    assert found.adjusted["chair_s"] >= found.metrics["chair_s"].p


def test_the_order_of_the_rows_does_not_matter(tmp_path):
    reversed_rows = document(BETTER)
    reversed_rows["rows"].reverse()
    straight = new_run(tmp_path / "a", document(BASE), document(BETTER))
    other = new_run(tmp_path / "b", document(BASE), reversed_rows)
    assert compare(EvaluatedPolicy(straight, 0), EvaluatedPolicy(straight, 1)) == compare(
        EvaluatedPolicy(other, 0), EvaluatedPolicy(other, 1)
    )


def test_a_policy_compared_with_itself_has_zero_differences(tmp_path):
    run = new_run(tmp_path, document(BASE))
    (found,) = compare(EvaluatedPolicy(run, 0), EvaluatedPolicy(run, 0))
    assert {(d.value, d.p) for d in found.metrics.values()} == {(0.0, 1.0)}
    assert all(d.low < 0 < d.high for d in found.metrics.values())


def test_a_metric_of_only_some_prompts_is_compared_on_those(tmp_path):
    old, new = document(BASE), document(BETTER)
    for side, answer in ((old, 0), (new, 1)):
        side["rows"][2]["tallies"]["yes_no_absent"] = (answer, 1)
    run = new_run(tmp_path, old, new)
    found = compare(EvaluatedPolicy(run, 0), EvaluatedPolicy(run, 1))[0].metrics["yes_no_absent"]
    assert (found.before, found.after, found.n) == (0.0, 1.0, 1)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (document(BETTER, seed=7), r"different protocols: seed \(1 vs. 7\)"),
        (document(BETTER, prompt="Look."), r"prompt \(missing vs. Look.\)"),
        (document(BETTER[:3]), "1 prompts were answered by only one of the policies"),
        (
            {"protocol": {"world": "harbour", "seed": 1}, "metrics": {}, "rows": [{"id": "a"}]},
            "has no per-prompt tallies",
        ),
    ],
)
def test_evaluations_that_are_not_comparable_are_refused(tmp_path, other, message):
    run = new_run(tmp_path, document(BASE), other)
    with pytest.raises(CsrError, match=message):
        compare(EvaluatedPolicy(run, 0), EvaluatedPolicy(run, 1))


def test_policies_without_a_common_evaluation_are_refused(tmp_path):
    run = new_run(tmp_path, document(BASE))
    with pytest.raises(CsrError, match=r"nothing to compare: .*iteration 1 has no evaluation in common"):
        compare(EvaluatedPolicy(run, 0), EvaluatedPolicy(run, 1))


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("recall < -0.1", True),
        ("recall<-0.1", True),
        ("recall < -0.5", False),
        ("world/recall <= -0.5", True),
        ("pope/recall < -0.1", None),
        ("recall.high < 0", False),
        ("recall.low < -0.5", True),
        ("chair_s < 0", True),
        ("chair_s >= 0", False),
        ("chair_i > 1e-3", False),
        ("nonsense > 0", None),
        ("Recall < -0.1", True),
        ("RECALL.high < 0", False),
        ("World/Recall (higher is better) < -0.1", True),
        ("CHAIR_S < 0", True),
        ("CHAIR_S (lower is better) >= 0", False),
        ("a b < 1", None),
    ],
)
def test_a_rule_triggers_where_its_condition_holds(tmp_path, text, holds):
    run = new_run(tmp_path, document(BASE), document(SILENT))  # recall 7/8 to 3/8
    found = compare(EvaluatedPolicy(run, 0), EvaluatedPolicy(run, 1))
    if holds is None:
        with pytest.raises(CsrError, match="was not measured"):
            triggered_rules([parse_rule(text)], found)
    else:
        assert bool(triggered_rules([parse_rule(text)], found)) is holds


def test_a_rule_fails_where_no_prompt_has_its_metric_under_both_policies(tmp_path):
    old, new = document(BASE), document(BETTER)
    for row in old["rows"][2:]:
        del row["tallies"]["recall"]
    for row in new["rows"][:2]:
        del row["tallies"]["recall"]
    run = new_run(tmp_path, old, new)
    found = compare(EvaluatedPolicy(run, 0), EvaluatedPolicy(run, 1))
    assert found[0].metrics["recall"].became_undefined
    (reason,) = triggered_rules([parse_rule("recall < -0.5")], found)
    assert "recall was 1 and is undefined now" in reason


def test_a_note_on_intervals_does_not_prevent_a_comparison(tmp_path):
    """Evaluations of 0.1 differ from new ones in how their intervals were computed, not in what was measured."""
    old = document(BASE, interval="95 % percentile bootstrap over scenes")
    run = new_run(tmp_path, old, document(BETTER, interval="95 % over scenes"))
    (found,) = compare(EvaluatedPolicy(run, 0), EvaluatedPolicy(run, 1))
    assert found.metrics["chair_s"].value == pytest.approx(-0.5)


@pytest.mark.parametrize("drop", [False, True])
def test_a_rule_fails_where_its_metric_became_undefined(tmp_path, drop):
    """A policy without a mention has no CHAIR_I; neither has one whose rows lack the metric."""
    mute = document([(0, 0, 0, 2)] * 4)
    if drop:
        for row in mute["rows"]:
            del row["tallies"]["chair_i"]
    run = new_run(tmp_path, document(BASE), mute)
    found = compare(EvaluatedPolicy(run, 0), EvaluatedPolicy(run, 1))
    (reason,) = triggered_rules([parse_rule("chair_i > 0.5")], found)
    assert "chair_i was 0.3636 and is undefined now" in reason
    back = compare(EvaluatedPolicy(run, 1), EvaluatedPolicy(run, 0))
    if not drop:
        assert triggered_rules([parse_rule("chair_i > 0.5")], back) == []


@pytest.mark.parametrize("text", ["", "recall", "recall = 1", "recall < much", "recall < -0.1 or 2", "< 1", "(a) < 1"])
def test_an_invalid_rule_is_refused(text):
    with pytest.raises(CsrError, match=r"is not a (valid )?rule"):
        parse_rule(text)
    with pytest.raises(CsrError, match=r"is not a (valid )?rule"):
        resolve(REQUIRED | {"evaluation": {"world": {}, "stop_if": [text]}})


ALL_METRICS = [*METRICS, *POPE_METRICS, "mean_f1", "f1_adversarial", "gqa"]


@pytest.mark.parametrize("key", ALL_METRICS)
@pytest.mark.parametrize("suffix", ["", ".low", ".high"])
def test_a_rule_takes_every_name_as_it_is_printed(key, suffix):
    """Labels such as "Yes/no, absent" contain a slash, and "Colors right" a space."""
    measured = [("world", name) for name in dict.fromkeys(ALL_METRICS)]
    label = metric_spec(key).label
    for name in (key, label, label.upper(), f"world/{label}", f"WORLD/{label.lower()}"):
        rule = parse_rule(f"{name}{suffix} < -0.01")
        assert (named_metrics(rule, measured), rule.field) == ([("world", key)], suffix[1:] or "value")
        assert rule.holds(-0.02)
        assert not rule.holds(0.0)


def test_an_ambiguous_name_is_refused():
    change = paired_difference([(0, 1)], [(1, 1)])
    found = [Comparison("lmms", {}, {"gqa": change, "GQA": change}, {}), Comparison("pope", {}, {"recall": change}, {})]
    with pytest.raises(CsrError, match="names 2 metrics") as caught:
        triggered_rules([parse_rule("Gqa > 0")], found)
    assert caught.value.hint == "expected one of: lmms/gqa, lmms/GQA"
    assert len(triggered_rules([parse_rule("GQA > 0")], found)) == 1, "spelled exactly like a key"
    with pytest.raises(CsrError, match="was not measured") as caught:
        triggered_rules([parse_rule("precision > 0")], found)
    assert caught.value.hint == "expected one of: lmms/gqa, lmms/GQA, pope/recall (Recall)"


@given(st.floats(-1, 1), st.sampled_from(["<", "<=", ">", ">="]), st.floats(-1, 1))
def test_a_rule_compares_with_its_operator(bound, sign, value):
    says = {"<": value < bound, "<=": value <= bound, ">": value > bound, ">=": value >= bound}[sign]
    assert parse_rule(f"recall {sign} {bound!r}").holds(value) is says


def test_a_rule_needs_an_evaluation():
    with pytest.raises(CsrError, match="stop_if requires an evaluation"):
        resolve(REQUIRED | {"evaluation": {"heldout": 0, "stop_if": ["recall < 0"]}})


def test_the_gate_keeps_the_last_good_iteration(tmp_path):
    run = new_run(tmp_path, document(BASE), document(BETTER), document(SILENT), stop_if=["recall < -0.1"])
    assert [gates.gate(run, number, Silent()) for number in (1, 2)] == [False, True]
    assert (run.stopped_at, run.final) == (2, 1)
    stages.export(run, Silent())
    assert (tmp_path / "adapter" / "weights").read_text() == "iteration 1"
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["stopped_at"], manifest["final_iteration"]) == (2, 1)
    assert "recall went from 0.875 to 0.375" in manifest["stages"]["iteration-2"]["gate"]["reasons"][0]
    assert "The run stopped after iteration 2 and returned iteration 1" in render(run)
    assert "stopped after iteration 2; the result is iteration 1" in invoke("show", tmp_path).stdout


def test_the_decision_of_the_gate_is_final(tmp_path):
    run = new_run(tmp_path, document(BASE), document(SILENT), stop_if=["recall < -0.1"])
    assert gates.gate(run, 1, Silent())
    files.write_json(run.evaluation_path(1, "world"), document(BETTER))
    assert gates.gate(Run.open(tmp_path), 1, Silent()), "going on with a stopped run does not start it again"


def test_the_gate_can_compare_with_the_previous_iteration(tmp_path):
    measured = [document(SILENT), document(BETTER), document(BASE)]
    rules: dict[str, Any] = {"stop_if": ["chair_s > 0.4"]}
    against_base = new_run(tmp_path / "a", *measured, **rules)
    assert gates.gate(against_base, 2, Silent()), "0 to 3/4"
    steps = new_run(tmp_path / "b", document(BASE), document(SILENT), document(BETTER), stop_against="last", **rules)
    assert not gates.gate(steps, 2, Silent()), "0 to 1/4"
    assert steps.result(2, "gate")["against"] == 1


def test_the_result_is_the_base_model_where_no_iteration_passes(tmp_path):
    run = new_run(tmp_path, document(BASE), document(SILENT), stop_if=["recall < -0.1"])
    assert gates.gate(run, 1, Silent())
    stages.export(run, Silent())
    assert run.final == 0
    assert not (tmp_path / "adapter").exists()
    assert "The result is the base model" in render(run)


def test_without_rules_every_iteration_passes(tmp_path):
    run = new_run(tmp_path, document(BASE), document(SILENT))
    assert not gates.gate(run, 1, Silent())
    assert run.result(1, "gate")["verdict"] == "go"
    assert run.final == 1


@pytest.fixture(autouse=True)
def _loud(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep libraries from being silenced: that would outlast the test, and it loads transformers."""
    monkeypatch.setattr(console, "quiet_libraries", lambda: None)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_prints_json_and_fails_with_the_reason(tmp_path):
    run = new_run(tmp_path, document(BASE), document(SILENT))
    fine = invoke("compare", run.root, "--json", "--fail-if", "chair_s > 0")
    assert fine.exit_code == 0
    found = json.loads(fine.stdout)
    assert found["before"]["iteration"] == 0
    assert found["after"]["iteration"] == 1
    assert found["comparisons"][0]["metrics"]["recall"]["value"] == pytest.approx(-0.5)
    failed = invoke("compare", run.root, run.root, "--iteration-a", 0, "--fail-if", "recall < -0.01")
    assert failed.exit_code == 3
    assert "failed: recall < -0.01" in failed.stderr
    assert "-0.500" in failed.stdout


def test_two_runs_are_compared_by_their_results(tmp_path):
    one = new_run(tmp_path / "one", document(BASE), document(BETTER))
    two = new_run(tmp_path / "two", document(BASE), document(SILENT))
    found = json.loads(invoke("compare", one.root, two.root, "--json").stdout)
    assert found["comparisons"][0]["metrics"]["chair_s"]["before"] == 0.25
    assert found["comparisons"][0]["metrics"]["chair_s"]["after"] == 0.0


@pytest.mark.parametrize("order", [("RUN", "--json"), ("--json", "RUN"), ("run", "RUN", "--json")])
def test_eval_accepts_a_run_in_place_of_a_command(tmp_path, order):
    run = new_run(tmp_path, document(BASE), document(BETTER))
    shown = invoke("eval", *(run.root if part == "RUN" else part for part in order), "--quiet")
    assert shown.exit_code == 0, shown.output
    assert [row["iteration"] for row in json.loads(shown.stdout)["measured"]] == [0, 1]


def test_eval_has_commands():
    assert "world-seed" in invoke("eval", "world", "--help").output
    assert invoke("eval", "--help").output.count("world") >= 1
    assert isinstance(invoke("eval", "/nonexistent").exception, CsrError)
