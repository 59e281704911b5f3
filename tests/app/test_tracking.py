"""Test the experiment trackers by reading back what a run logged to each, offline."""

from __future__ import annotations

import shutil
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from csr_vlm.config.schema import TrackingConfig
from csr_vlm.pipeline.tracking import Tracking, iteration_values
from csr_vlm.store import files
from csr_vlm.store.run import Run

NAMES = ("heldout/words", "audit/scorer_agreement/stop", "seconds/train", "memory_gb/train")


def needs(name: str) -> pytest.MarkDecorator:
    """Skip a test where a tracker is not installed."""
    reason = f"{name} is not installed; make test-app has an environment with it"
    return pytest.mark.skipif(util.find_spec(name) is None, reason=reason)


@pytest.fixture
def log_to(short_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that logs a copy of the run, closing the tracker between iterations and report."""
    for name, value in (
        ("WANDB_MODE", "offline"),
        ("WANDB_SILENT", "true"),
        ("TRACKIO_DIR", str(tmp_path / "trackio")),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def log(name: str) -> Run:
        config = short_run.config.model_copy(update={"tracking": TrackingConfig(to=(name,), project="test")})
        run = Run.create(shutil.copytree(short_run.root, tmp_path / "run"), config)
        first = Tracking(run, pytest.fail)
        first.log_iterations()
        first._services[name].close()
        resumed = Tracking(run, pytest.fail)
        resumed.log_iterations()
        resumed.finish(run.root / "report.html")
        return run

    return log


@needs("tensorboard")
def test_tensorboard(log_to: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = log_to("tensorboard")
    events = EventAccumulator(str(run.root / "tensorboard"))
    events.Reload()
    expected = iteration_values(run, 1)
    for name in NAMES:
        last = events.Scalars(name)[-1]
        assert (last.step, last.value) == (1, pytest.approx(expected[name]))
    assert [event.step for event in events.Scalars("heldout/words")] == [0, 1]
    assert [event.step for event in events.Scalars("train/loss")] == [1]
    assert any(tag.startswith("examples") for tag in events.Tags()["images"])


@needs("mlflow")
def test_mlflow(log_to: Any) -> None:
    from mlflow import MlflowClient

    run = log_to("mlflow")
    client = MlflowClient(f"sqlite:///{run.root / 'mlflow.db'}", registry_uri=(run.root / "mlregistry").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    expected = iteration_values(run, 1)
    for name in NAMES:
        last = client.get_metric_history(found.info.run_id, name)[-1]
        assert (last.step, last.value) == (1, pytest.approx(expected[name]))
    artifacts = {artifact.path for artifact in client.list_artifacts(found.info.run_id)}
    assert {"report.html", "examples.json", "examples", "config.yaml"} <= artifacts


@needs("trackio")
def test_trackio(log_to: Any) -> None:
    import trackio

    run = log_to("trackio")
    name = files.read_json(run.root / "tracking.json")["trackio"]["id"]
    (found,) = trackio.Api().runs("test")
    assert found.name == name
    rows = trackio.SQLiteStorage.get_logs("test", name)
    expected = iteration_values(run, 1)
    by_iteration = {row["iteration"]: row for row in rows if "heldout/words" in row}
    assert sorted(by_iteration) == [0, 1]
    assert all(by_iteration[1][key] == pytest.approx(expected[key]) for key in NAMES)
    assert any("examples" in row for row in rows)


@needs("wandb")
def test_wandb(log_to: Any) -> None:
    run = log_to("wandb")
    run_id = files.read_json(run.root / "tracking.json")["wandb"]["id"]
    sessions = sorted((run.root / "wandb").glob(f"offline-run-*-{run_id}"))
    assert len(sessions) == 2, "one session a process, both of the same run"
    written = b"".join(path.read_bytes() for session in sessions for path in session.glob("*.wandb"))
    assert all(name.encode() in written for name in NAMES)
    assert list((run.root / "wandb").glob("offline-run-*/files/media/table/examples*.json"))
