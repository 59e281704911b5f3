"""Test that the benchmarks run at their smallest size and pass their own checks; speed is not tested."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from csr_vlm.config.load import load_config
from tests.processes import run_script
from tests.unit.builders import REQUIRED

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("scoring.py --images 1 --candidates 8 --pairs 2 --rounds 1 --json", '"missed"'),
        ("dpo.py --pairs 1 --questions 1 --repeats 1 --tokens 8", "tokens / distinct 1.000"),
        ("engine.py tiny --scale 0.04 --lengths fixed --repeats 1", '"prefill tokens over prompt tokens": 1.0'),
    ],
)
def test_a_benchmark_runs(command: str, expected: str) -> None:
    script, *arguments = command.split()
    assert expected in run_script(BENCHMARKS / script, *arguments).stdout


def test_the_overrides_of_every_evidence_job_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    jobs = importlib.import_module("evidence").JOBS
    resolved = [load_config(None, job.overrides.split(), base=REQUIRED) for job in jobs]
    assert len(resolved) > 40


def test_a_stream_of_work_items_keeps_the_rows_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = importlib.import_module("occupancy").measure(num_prompts=48, part=8, rows=48)
    assert found["as one stream"]["share"] >= 0.85
    assert found["item by item"]["share"] < 0.6, "the measure must be able to fail"
