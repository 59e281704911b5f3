"""Write to experiment trackers: TensorBoard, Weights & Biases, trackio and MLflow.

To add one, write a class with the methods of :class:`Service`, add it to ``_SERVICES`` and to ``tracking.to`` of
:class:`csr_vlm.config.schema.TrackingConfig`, and test it in ``tests/app/test_tracking.py``.
"""

from __future__ import annotations

import html
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from csr_vlm.core.secrets import without_secrets
from csr_vlm.store.run import Run

COLUMNS = ("picture", "prompt", "question", "before", "after", "change")


@dataclass(frozen=True)
class Example:
    """Hold a held-out picture with the responses of two policies."""

    prompt_id: str
    question: str
    before: str
    after: str
    change: str
    picture: Any
    """PIL image, or None."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Return the columns after the picture."""
        return self.prompt_id, self.question, self.before, self.after, self.change


class Service(Protocol):
    """Define one open run of a tracker, constructed as ``Service(run, run_id)``, where None begins a new one."""

    run_id: str
    """Identifies the run of the tracker when it is opened again."""

    def log_iteration(self, iteration: int, values: Mapping[str, float]) -> None:
        """Log the values of an iteration."""
        ...

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a training step."""
        ...

    def finish(self, report: Path, examples: Sequence[Example], iteration: int) -> None:
        """Add the report and the examples, and close the run."""
        ...

    def close(self) -> None:
        """Close the run."""
        ...


def open_service(name: str, run: Run, run_id: str | None) -> Service:
    """Open the run of a tracker, or begin one."""
    service: Service = _SERVICES[name](run, run_id)
    return service


def run_name(run: Run) -> str:
    """Return the name of a run in trackers: that of its folder."""
    return run.root.resolve().name


def _settings(run: Run) -> dict[str, Any]:
    settings: dict[str, Any] = without_secrets(run.config.dump())
    return settings


class _TensorBoard:
    """Write event files to RUN/tensorboard."""

    def __init__(self, run: Run, run_id: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run_id = run_id or "tensorboard"
        self._writer = SummaryWriter(str(run.root / self.run_id))

    def log_iteration(self, iteration: int, values: Mapping[str, float]) -> None:
        self.log_step(iteration, values)

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self, report: Path, examples: Sequence[Example], iteration: int) -> None:
        import numpy as np

        rows = ["| " + " | ".join(COLUMNS[1:]) + " |", "|---" * len(COLUMNS[1:]) + "|"]
        for example in examples:
            # TensorBoard renders Markdown.
            cells = [html.escape(text).replace("|", "\\|").replace("\n", " ") for text in example.texts]
            rows.append("| " + " | ".join(cells) + " |")
            if example.picture is not None:
                pixels = np.asarray(example.picture)
                self._writer.add_image(f"examples/{example.prompt_id}", pixels, iteration, dataformats="HWC")
        self._writer.add_text("examples", "\n".join(rows), iteration)
        self._writer.add_text("report", str(report), iteration)
        self.close()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Log to Weights & Biases; WANDB_MODE=offline keeps everything on this disk."""

    def __init__(self, run: Run, run_id: str | None) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=run.config.tracking.project,
            name=run_name(run),
            id=run_id or uuid.uuid4().hex[:12],
            resume="allow",
            dir=str(run.root),
            config=_settings(run),
            reinit="create_new",
        )
        self.run_id = str(self._run.id)
        self._run.define_metric("iteration")
        self._run.define_metric("training_step")
        self._run.define_metric("*", step_metric="iteration")
        self._run.define_metric("train/*", step_metric="training_step")

    def log_iteration(self, iteration: int, values: Mapping[str, float]) -> None:
        # The counts of a training are values of the iteration, not of a step.
        renamed = {re.sub(r"^train/", "training/", name): value for name, value in values.items()}
        self._run.log({**renamed, "iteration": iteration})

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "training_step": step})

    def finish(self, report: Path, examples: Sequence[Example], iteration: int) -> None:
        rows = [
            [None if example.picture is None else self._wandb.Image(example.picture), *example.texts]
            for example in examples
        ]
        self._run.log({"examples": self._wandb.Table(columns=list(COLUMNS), data=rows), "iteration": iteration})
        artifact = self._wandb.Artifact(f"report-{self.run_id}", type="report")
        artifact.add_file(str(report))
        self._run.log_artifact(artifact)
        self.close()

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """Log to trackio, which stores its runs in TRACKIO_DIR."""

    def __init__(self, run: Run, run_id: str | None) -> None:
        import trackio

        self._trackio = trackio
        # trackio finds a run by its name.
        self.run_id = run_id or f"{run_name(run)}-{uuid.uuid4().hex[:6]}"
        trackio.init(run.config.tracking.project, name=self.run_id, resume="allow", config=_settings(run), embed=False)

    def log_iteration(self, iteration: int, values: Mapping[str, float]) -> None:
        self._trackio.log({**values, "iteration": iteration})

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log({**values, "training_step": step})

    def finish(self, report: Path, examples: Sequence[Example], iteration: int) -> None:
        import pandas as pd

        rows = [
            [None if example.picture is None else self._trackio.Image(example.picture), *example.texts]
            for example in examples
        ]
        if rows:
            table = self._trackio.Table(dataframe=pd.DataFrame(rows, columns=list(COLUMNS)))
            self._trackio.log({"examples": table, "iteration": iteration})
        self._trackio.log_artifact(str(report), name=f"report-{self.run_id}", type="report")
        self.close()

    def close(self) -> None:
        self._trackio.finish()


class _MLflow:
    """Log to MLflow: to MLFLOW_TRACKING_URI, or else to a database in the run's folder."""

    def __init__(self, run: Run, run_id: str | None) -> None:
        from mlflow import MlflowClient

        root = run.root.resolve()
        address = os.environ.get("MLFLOW_TRACKING_URI")
        # The registry of models is not used; mlflow-skinny has none in a database.
        local = {"tracking_uri": f"sqlite:///{root / 'mlflow.db'}", "registry_uri": (root / "mlregistry").as_uri()}
        self._client = MlflowClient(**({"tracking_uri": address} if address else local))
        project = run.config.tracking.project
        found = self._client.get_experiment_by_name(project)
        location = None if address else (root / "mlartifacts").as_uri()
        experiment = found.experiment_id if found else self._client.create_experiment(project, location)
        self.run_id = run_id or str(self._client.create_run(experiment, run_name=run_name(run)).info.run_id)
        if run_id is None:
            self._client.log_dict(self.run_id, _settings(run), "config.yaml")
        else:
            self._client.update_run(self.run_id, status="RUNNING")

    def log_iteration(self, iteration: int, values: Mapping[str, float]) -> None:
        self.log_step(iteration, values)

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def finish(self, report: Path, examples: Sequence[Example], iteration: int) -> None:
        names = []
        for index, example in enumerate(examples):
            names.append(f"examples/{index}.png" if example.picture is not None else "")
            if example.picture is not None:
                self._client.log_image(self.run_id, example.picture, artifact_file=names[-1])
        columns = zip(COLUMNS[1:], zip(*(example.texts for example in examples), strict=True), strict=True)
        if examples:
            table = {"picture": names, **{name: list(texts) for name, texts in columns}}
            self._client.log_table(self.run_id, table, artifact_file="examples.json")
        self._client.log_artifact(self.run_id, str(report))
        self.close()

    def close(self) -> None:
        self._client.set_terminated(self.run_id)


_SERVICES: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio, "mlflow": _MLflow}
