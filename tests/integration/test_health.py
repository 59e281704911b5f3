"""Test sweeps over one ledger, and the audit on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from csr_vlm.cli.app import app
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Silent
from csr_vlm.method.audit import PAIR_BOUNDS, RESPONSE_BOUNDS
from csr_vlm.models.loading import load_base
from csr_vlm.pipeline import gates, stages
from csr_vlm.pipeline.sweep import points, sweep
from csr_vlm.store import tables
from csr_vlm.store.run import Run
from tests.integration.conftest import small_config

AXIS = "method.lambda=0.0,1.0"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One iteration, generated and paired; the base model and, without a training, its twin evaluated."""
    directory = tmp_path_factory.mktemp("ledger")
    made = Run.create(directory / "run", small_config(directory, iterations=1))
    stages.check_inputs(made, Silent())
    stages.generate(made, 1, Silent())
    stages.make_pairs(made, 1, Silent())
    return made


@pytest.fixture(scope="module")
def swept(run: Run) -> list[dict[str, Any]]:
    return sweep(run, [AXIS], 1, run.root / "sweeps", Silent())


def roots(run: Run) -> dict[str, Path]:
    """Map the overrides of each point of the sweep to its directory."""
    found = (run.root / "sweeps").glob("*/result.json")
    return {" ".join(json.loads(path.read_text())["overrides"]): path.parent for path in found}


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_points_of_a_sweep_differ(run: Run, swept: list[dict[str, Any]]) -> None:
    assert [row["overrides"] for row in swept] == [["method.lambda=0.0"], ["method.lambda=1.0"]]
    prior, image = swept
    assert prior["pairs"] != image["pairs"]
    assert prior["metrics"].keys() == {"heldout"}
    assert prior["metrics"]["heldout"]["sentences"]["n"] == 2, "an eighth of sixteen prompts"
    first, second = (load_file(root / "adapter" / "adapter_model.safetensors") for root in roots(run).values())
    assert any((first[name] != second[name]).any() for name in first)
    pairs = list(tables.read_pairs(roots(run)["method.lambda=1.0"] / "pairs.parquet"))
    assert len(pairs) == image["pairs"]["pairs"]


def test_a_sweep_leaves_the_run_alone(run: Run, swept: list[dict[str, Any]]) -> None:
    assert not run.is_done(1, "train")
    assert not (run.root / "adapter").exists()
    derived, _ = stages.derive_pairs(run, 1, run.config)
    assert list(tables.read_pairs(run.pairs_path(1))) == derived


def test_sweeping_again_computes_nothing(run: Run, swept: list[dict[str, Any]], monkeypatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in (run.root / "sweeps").rglob("*")}
    monkeypatch.setattr("csr_vlm.pipeline.sweep.evaluate_policy", lambda *_: pytest.fail("it evaluated again"))
    assert sweep(run, [AXIS], 1, run.root / "sweeps", Silent()) == swept
    shown = invoke("sweep", run.root, AXIS, "--json", "--quiet")
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["points"] == swept
    assert {path: path.stat().st_mtime_ns for path in (run.root / "sweeps").rglob("*")} == before


def test_every_point_keeps_an_adapter_that_loads(run: Run, swept: list[dict[str, Any]]) -> None:
    for root in roots(run).values():
        model, _ = load_base(run.config.model)
        loaded = PeftModel.from_pretrained(model, str(root / "adapter"))
        weights = [parameter for name, parameter in loaded.named_parameters() if "lora_B" in name]
        assert weights
        assert any(weight.abs().sum() > 0 for weight in weights), "it was trained"


@pytest.mark.parametrize(
    "axis", ["seed=1,2", "method.search.num_candidates=2,3", "model.dtype=bfloat16", "iterations=2,3"]
)
def test_settings_of_the_ledger_cannot_be_swept(run: Run, axis: str) -> None:
    with pytest.raises(CsrError, match="determines the ledger and cannot be swept") as caught:
        sweep(run, [axis], 1, run.root / "refused", Silent())
    assert "start a run for each value" in caught.value.hint
    assert not (run.root / "refused").exists()


def test_settings_of_a_ledger_column_cannot_be_swept(run: Run) -> None:
    with pytest.raises(CsrError, match="determines the ledger's column 'clip'") as caught:
        sweep(run, ["scorer.path=elsewhere"], 1, run.root / "refused", Silent())
    assert "csr score RUN" in caught.value.hint


@pytest.mark.parametrize("axis", ["method.lambda", "=1", "method.lambda="])
def test_an_invalid_axis_is_refused(axis: str) -> None:
    with pytest.raises(CsrError, match="is not a valid sweep axis"):
        list(points([axis]))


def test_a_point_without_pairs_is_an_error(run: Run) -> None:
    with pytest.raises(CsrError, match="these settings yield no pairs"):
        sweep(run, ["method.pairs.min_margin=99"], 1, run.root / "none", Silent())


def test_the_audit_prints_every_metric(run: Run) -> None:
    shown = invoke("audit", run.root, "--json")
    found = json.loads(shown.stdout)
    assert found["iteration"] == 1
    assert found["metrics"] == pytest.approx(gates.pair_metrics(run, 1, run.config))
    assert [check["metric"] for check in found["checks"]] == [
        metric for metric in PAIR_BOUNDS if metric in found["metrics"]
    ]
    assert found["metrics"]["claim_agreement"] > 0.62
    assert found["metrics"]["nearest_agreement"] > 0.515
    assert shown.exit_code == (3 if found["verdict"] == "stop" else 0)


def test_the_audit_fails_for_pairs_not_worth_training_on(run: Run) -> None:
    bad = invoke("audit", run.root, "method.pairs.min_margin=99", "--json")
    found = json.loads(bad.stdout)
    assert bad.exit_code == 3
    assert found["verdict"] == "stop"
    assert found["metrics"]["pairs"] == 0
    table = invoke("audit", run.root, "method.pairs.min_margin=99")
    assert table.exit_code == 3
    assert "iteration 1: stop" in table.output
    assert not run.is_done(1, "audit"), "csr audit writes no marker"


def test_the_audit_passes_within_the_bounds(run: Run, monkeypatch) -> None:
    lenient = {name: type(b)(-9.0, -9.0, False, b.reason) for name, b in PAIR_BOUNDS.items()}
    monkeypatch.setattr("csr_vlm.method.audit.PAIR_BOUNDS", lenient)
    shown = invoke("audit", run.root, "--json")
    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["verdict"] == "go"


def test_the_audit_of_a_trained_iteration_has_its_responses_too(run: Run) -> None:
    metrics = {
        name: {"value": value, "low": value, "high": value, "n": 2}
        for name, value in {"sentences": 4.0, "words": 20.0, "repeats": 0.0, "complete": 1.0, "relevance": 30.0}.items()
    }
    run.mark_done(0, "evaluate", heldout=metrics)
    run.mark_done(1, "evaluate", heldout=metrics | {"sentences": metrics["sentences"] | {"value": 0.0}})
    try:
        shown = invoke("audit", run.root, "--json")
        assert shown.exit_code == 3
        found = json.loads(shown.stdout)
        judged = {check["metric"]: check for check in found["checks"]}
        assert judged.keys() >= RESPONSE_BOUNDS.keys() - {"chosen_drop"}
        assert judged["sentences_ratio"]["verdict"] == "stop"
        other = json.loads(invoke("audit", run.root, "method.lambda=1.0", "--json").stdout)
        assert "sentences_ratio" not in other["metrics"], "other settings were not trained"
    finally:
        for number in (0, 1):
            (run.iteration(number) / "done" / "evaluate.json").unlink()
