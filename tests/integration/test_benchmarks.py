"""The benchmarks run, at their smallest, and what they check on the way holds; how fast they are is not looked at."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from csr_vlm.config.load import load_config
from tests.unit.builders import REQUIRED

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("scoring.py --images 1 --candidates 8 --pairs 2 --rounds 1 --json", '"missed"'),
        ("dpo.py --pairs 1 --shared 0 --repeats 1 --tokens 6", "ratio"),
        ("engine.py tiny --scale 0.04 --lengths fixed --repeats 1", '"prefill tokens over prompt tokens": 1.0'),
    ],
)
def test_it_runs(command: str, said: str) -> None:
    script, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_the_settings_of_every_piece_of_evidence_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    jobs = importlib.import_module("evidence").JOBS
    resolved = [load_config(None, job.overrides.split(), base=REQUIRED) for job in jobs]
    assert len(resolved) > 40
