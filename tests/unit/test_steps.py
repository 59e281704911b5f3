"""Choose the pairs of training steps: the same for any number of processes, and again after a restart."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Pair, Prompt, Response
from csr_vlm.store import tables
from csr_vlm.store.tables import PairFiles
from csr_vlm.training.reference import reference_tolerance
from csr_vlm.training.steps import StepDataset, StepLoader, StepPlan


def pair(number: int, image: int) -> Pair:
    sides = [Response(str(side), (number, side), -1.0, "", 1, 0.0, complete=True) for side in range(2)]
    return Pair(Prompt(f"p{number}", f"{image}.png", "Why?"), 1, sides[0], sides[1])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 32), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_takes_every_pair_once_in_steps_of_whole_units(
    sizes: list[int], pairs_per_step: int, seed: int, epoch: int
) -> None:
    plan = StepPlan(sizes, pairs_per_step, seed)
    steps = [plan.pairs(epoch, step) for step in range(plan.num_steps)]
    assert plan.num_steps == -(-sum(sizes) // pairs_per_step)
    assert all(len(step) for step in steps)
    assert sorted(np.concatenate(steps).tolist()) == list(range(sum(sizes)))
    largest = min(max(sizes), pairs_per_step)
    assert all(len(step) < pairs_per_step + 2 * largest for step in steps)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    for step in steps:
        if len(step) and max(sizes) <= pairs_per_step:
            for group in set(groups[step].tolist()):  # an image's pairs are in one step
                assert int((groups[step] == group).sum()) == sizes[group]
    again = StepPlan(sizes, pairs_per_step, seed)
    assert all(np.array_equal(again.pairs(epoch, step), steps[step]) for step in reversed(range(plan.num_steps)))


def test_epochs_and_seeds_have_different_orders() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        plan = StepPlan([2] * 20, 8, seed)
        return np.concatenate([plan.pairs(epoch, step) for step in range(plan.num_steps)]).tolist()

    assert order(0, 0) != order(0, 1) != order(1, 1)


def test_pairs_about_an_image_are_consecutive_whatever_their_files(tmp_path: Path) -> None:
    images = [0, 1, 0, 2, 1, 0]
    tables.write_pairs(tmp_path / "a.parquet", [pair(n, image) for n, image in enumerate(images)])
    tables.write_pairs(tmp_path / "b.parquet", [pair(6 + n, image) for n, image in enumerate([2, 0])])
    files = PairFiles([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    assert len(files) == 8
    assert files.group_sizes.tolist() == [4, 2, 2]
    assert [p.prompt.prompt_id for p in files[range(8)]] == ["p0", "p2", "p5", "p7", "p1", "p4", "p3", "p6"]
    assert [p.prompt.prompt_id for p in files[[7, 0, 0]]] == ["p6", "p0", "p0"]


class Recorder:
    """Stand in for the collator: one pass that names its pairs."""

    def passes(self, pairs: list[Pair]) -> list[dict[str, Any]]:
        return [{"prompt_ids": [p.prompt.prompt_id for p in pairs]}]


def dataset(tmp_path: Path, collator: Any, num_processes: int = 1, process: int = 0) -> StepDataset:
    tables.write_pairs(tmp_path / "pairs.parquet", [pair(n, n // 3) for n in range(30)])
    files = PairFiles([tmp_path / "pairs.parquet"])
    return StepDataset(files, StepPlan(files.group_sizes, 6, 0), collator, process, num_processes)


@pytest.mark.parametrize("num_processes", [2, 4, 8])
def test_processes_share_the_pairs_of_each_step(tmp_path: Path, num_processes: int) -> None:
    alone = dataset(tmp_path, Recorder())
    for step in range(2 * len(alone)):
        together: list[str] = []
        for process in range(num_processes):
            item = dataset(tmp_path, Recorder(), num_processes, process)[step]
            together += [] if item["is_idle"] else item["passes"][0]["prompt_ids"]
            assert item["num_pairs"] == alone[step]["num_pairs"]
        assert together == alone[step]["passes"][0]["prompt_ids"]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_the_steps_of_the_epoch_in_order(tmp_path: Path, workers: int) -> None:
    steps = dataset(tmp_path, Recorder())
    loader = StepLoader(steps, workers, None, pin_memory=False)
    state = torch.random.get_rng_state()
    for epoch in (0, 2):
        loader.set_epoch(epoch)
        assert [item["passes"] for item in loader] == [steps[epoch * 5 + step]["passes"] for step in range(5)]
    assert torch.equal(torch.random.get_rng_state(), state), "a checkpoint's random state does not depend on loading"


def test_an_error_in_a_worker_keeps_its_hint(tmp_path: Path) -> None:
    def passes(pairs: list[Pair]) -> None:
        raise CsrError("the image is gone", "restore it")

    (first, *_) = StepLoader(dataset(tmp_path, SimpleNamespace(passes=passes)), 1, None, pin_memory=False)
    assert first == {"error": ("the image is gone", "restore it")}


def test_recomputed_reference_values_replace_those_of_the_files(tmp_path: Path) -> None:
    taken: list[Pair] = []
    steps = dataset(tmp_path, SimpleNamespace(passes=lambda pairs: taken.extend(pairs) or []))
    steps.reference = np.stack([np.arange(30.0), -np.arange(30.0)], axis=1)
    for step in range(len(steps)):
        steps[step]
    assert len(taken) == 30
    assert all(p.chosen.logprob == float(p.prompt.prompt_id[1:]) == -p.rejected.logprob for p in taken)


def test_the_tolerance_grows_with_the_spacing_of_numbers_and_the_length() -> None:
    # Values from 16 to 32 have a spacing of 1/8 in bfloat16; three standard deviations of 4 such errors.
    assert reference_tolerance(0.0, torch.bfloat16, 4) == pytest.approx(3 * 2 * 0.125 / 12**0.5)
    assert reference_tolerance(0.0, torch.float16, 4) == pytest.approx(3 * 2 * (0.125 / 8) / 12**0.5)
    assert reference_tolerance(0.05, torch.float32, 1000) == pytest.approx(0.05, abs=1e-4)


def test_reading_pairs_needs_no_more_memory_for_more_pairs(tmp_path: Path) -> None:
    import tracemalloc

    def peak(num_pairs: int) -> int:
        path = tmp_path / f"{num_pairs}.parquet"
        tables.write_pairs(path, (pair(n, n // 4) for n in range(num_pairs)))
        tracemalloc.start()
        files = PairFiles([path])
        steps = StepDataset(files, StepPlan(files.group_sizes, 16, 0), Recorder())
        for step in range(40):
            steps[step]
        largest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return largest

    small, large = peak(1_000), peak(20_000)
    # Twenty bytes a pair: its number in the order, its image and the units.
    assert large - small < 60 * 19_000
