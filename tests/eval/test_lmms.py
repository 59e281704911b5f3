"""Test the integration of lmms-eval end to end: an offline task, the shipped models, a run's adapter."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; make test-eval has an environment with it")

import pyarrow as pa
import pyarrow.parquet as pq
from typer.testing import CliRunner

from csr_vlm.cli import console
from csr_vlm.cli.app import app
from csr_vlm.core.progress import Silent
from csr_vlm.pipeline.loop import align
from csr_vlm.store.run import Run
from csr_vlm.world.corpus import yes_no_question
from csr_vlm.world.scenes import HARBOUR, Split, make_scenes, render
from tests.integration.conftest import small_config

TASK = """
task: harbour_yes_no
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
process_results: !function utils.process
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
  do_sample: false
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 0.0
"""
CODE = """
import io

from PIL import Image


def visual(doc):
    return [Image.open(io.BytesIO(picture)) for picture in doc["pictures"]]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process(doc, results):
    return {"right": float(results[0].strip().lower().startswith(doc["answer"]))}
"""


def write_task(folder: Path, num_pictures: int = 1) -> Path:
    """Write a task of yes/no questions about drawn scenes, half of which have the answer yes."""
    folder.mkdir()
    rows = []
    for at, scene in enumerate(make_scenes(HARBOUR, Split.DEVELOPMENT, 3, 12)):
        buffer = io.BytesIO()
        render(scene).save(buffer, format="PNG")
        absent = sorted(set(HARBOUR.kinds) - set(scene.kinds))[at]
        kind, answer = (min(scene.kinds), "yes") if at % 2 else (absent, "no")
        rows.append(
            {"pictures": [buffer.getvalue()] * num_pictures, "question": yes_no_question(kind), "answer": answer}
        )
    pq.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")
    (folder / "task.yaml").write_text(TASK.format(data=folder / "test.parquet"))
    (folder / "utils.py").write_text(CODE)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("lmms")
    made = Run.create(directory / "run", small_config(directory, iterations=1))
    align(made, Silent())
    return made


@pytest.fixture(autouse=True)
def _loud(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep libraries from being silenced: that would outlast the test."""
    monkeypatch.setattr(console, "quiet_libraries", lambda: None)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_run_is_evaluated_on_a_task(run: Run, tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks")
    shown = invoke("eval", "lmms", run.root, "--tasks", "harbour_yes_no", "--include", folder, "--json", "-q")
    assert shown.exit_code == 0, shown.exception
    assert [row["iteration"] for row in json.loads(shown.stdout)] == [0, 1], "nothing but data on stdout"
    for number in (0, 1):
        document = json.loads(run.evaluation_path(number, "lmms").read_text())
        metric = document["metrics"]["harbour_yes_no_right"]
        assert metric["n"] == 12
        assert metric["value"] >= 0.75, "the base answers nine in ten of such questions"
        assert metric["low"] <= metric["value"] <= metric["high"]
        assert document["protocol"]["harbour_yes_no"]["max_new_tokens"] == 8
        assert {row["text"].lower().rstrip(".") for row in document["rows"]} == {"yes", "no"}
        right = sum(row["tallies"]["harbour_yes_no_right"][0] for row in document["rows"])
        assert right / 12 == pytest.approx(metric["value"])
    compared = json.loads(invoke("compare", run.root, "--json").stdout)
    (of_task,) = [found for found in compared["comparisons"] if found["evaluation"] == "lmms"]
    assert of_task["metrics"]["harbour_yes_no_right"]["test"] == "McNemar, exact"


def test_questions_with_several_images_are_refused(run: Run, tmp_path: Path) -> None:
    folder = write_task(tmp_path / "pairs", num_pictures=2)
    shown = invoke("eval", "lmms", run.root, "--tasks", "harbour_yes_no", "--include", folder, "--iteration", 0, "-q")
    assert "12 questions do not have exactly one image" in str(shown.exception)


def test_a_failing_request_ends_the_evaluation(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from csr_vlm.generation.transformers_engine import TransformersEngine

    def fail(*arguments: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(TransformersEngine, "respond", fail)
    folder = write_task(tmp_path / "tasks")
    shown = invoke("eval", "lmms", run.root, "--tasks", "harbour_yes_no", "--include", folder, "--iteration", 0, "-q")
    assert isinstance(shown.exception, RuntimeError)


def test_lmms_eval_has_the_papers_tasks(tmp_path: Path) -> None:
    """Look up tasks and folders in lmms-eval; no data is loaded."""
    import lmms_eval
    from lmms_eval.tasks import TaskManager

    from csr_vlm.evaluation.lmms import BENCHMARKS

    home = Path(lmms_eval.__file__).parent / "tasks"
    folders = [str(home / benchmark.folder) for benchmark in BENCHMARKS.values()]
    known = TaskManager("ERROR", include_path=folders, include_defaults=False).all_tasks
    assert {benchmark.task for benchmark in BENCHMARKS.values()} <= set(known)
