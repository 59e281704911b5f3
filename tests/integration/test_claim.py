"""Test the main claim at a small scale: one seed, three iterations, 300 test scenes. See also ``make evidence``."""

from __future__ import annotations

from pathlib import Path

import pytest

from csr_vlm.config.load import load_config
from csr_vlm.core.progress import Silent
from csr_vlm.pipeline.loop import align
from csr_vlm.store.run import Run
from csr_vlm.world.demo import demo_config

ITERATIONS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root: Path = tmp_path_factory.mktemp("claim")
    base = demo_config(root, seed=0, num_prompts=256, num_scenes=300).dump()
    new_run = Run.create(root / "run", load_config(None, [f"iterations={ITERATIONS}"], base=base))
    align(new_run, Silent())
    return new_run


def values(run: Run, iteration: int) -> dict[str, float]:
    return {name: metric["value"] for name, metric in run.metrics(iteration).items()}


@pytest.mark.slow
def test_hallucination_falls_by_four_fifths(run: Run) -> None:
    before, after = values(run, 0), values(run, ITERATIONS)
    assert before["chair_s"] > 0.3
    assert after["chair_s"] < 0.2 * before["chair_s"]
    assert after["chair_i"] < 0.2 * before["chair_i"]


@pytest.mark.slow
def test_present_objects_are_still_named(run: Run) -> None:
    """Check that hallucination does not fall through short responses.

    With 300 scenes, the standard error of recall is 0.003 and that of companion recall 0.008.
    """
    before, after = values(run, 0), values(run, ITERATIONS)
    assert after["recall"] > before["recall"] - 0.01
    assert after["companion_recall"] > before["companion_recall"] - 0.03
    assert after["attributes_right"] > before["attributes_right"] - 0.005
    assert after["complete"] == 1.0


@pytest.mark.slow
def test_responses_do_not_repeat_themselves(run: Run) -> None:
    before, after = values(run, 0), values(run, ITERATIONS)
    assert after["repeats"] < before["repeats"] + 0.03


@pytest.mark.slow
def test_every_iteration_improves_and_passes_its_gates(run: Run) -> None:
    rates = [values(run, number)["chair_s"] for number in range(ITERATIONS + 1)]
    assert rates[1] < rates[0] - 0.1
    assert rates[2] < rates[1]
    assert rates[3] < rates[2] + 0.01, "little is left to improve"
    for number in range(1, ITERATIONS + 1):
        assert not run.result(number, "audit")["stopped"]
        assert not run.result(number, "gate")["stopped"]
    assert run.final == ITERATIONS
