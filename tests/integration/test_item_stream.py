"""Search several work items as one stream: the same trees, whatever else decodes, fails or was there before."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Silent
from csr_vlm.core.records import Node
from csr_vlm.generation.decoding import PartialCandidate, TokenSampler
from csr_vlm.generation.transformers_engine import TransformersEngine
from csr_vlm.pipeline import stages
from csr_vlm.pipeline.tasks import SearchWorker
from csr_vlm.scale.executor import results_of
from csr_vlm.store import tables
from csr_vlm.store.run import Run
from tests.integration.conftest import small_config

NUM_ITEMS = 4
TOLERANCE = 1e-5
"""Nats a token: other batch sizes round differently."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Store eight prompts in four items, and search them item by item."""
    method = {"search": {"max_sentences": 2}, "claims": {"caption": "a photo of {a} {0}"}}
    config = small_config(
        tmp_path_factory.mktemp("pictures"),
        iterations=1,
        evaluation={"heldout": 0},
        method=method,
        data={"limit": 8},
        generation={"prompts_per_part": 2},
    )
    run = Run.create(tmp_path_factory.mktemp("run") / "made", config)
    stages.store_inputs(run, Silent(), model=None)
    stages.generate(run, 1, Silent())
    return run


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Run:
    """Copy the prompts without the ledger, to be searched as one stream."""
    run = Run.open(shutil.copytree(made.root, tmp_path / "run"))
    shutil.rmtree(run.iteration(1))
    return with_items(run, "on")


def with_items(run: Run, across: str) -> Run:
    generation = run.config.generation.model_copy(update={"across_items": across})
    return replace(run, config=run.config.model_copy(update={"generation": generation}))


@pytest.fixture
def claimed() -> list[int]:
    return []


def search(run: Run, claimed: list[int], monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[str]]:
    """Search as an executor does; return the number of items claimed at each result, and the log."""
    monkeypatch.setattr(Run, "open", lambda root: run)
    log: list[str] = []

    def items() -> Iterator[int]:
        for item in range(NUM_ITEMS):
            claimed.append(item)
            yield item

    worker = SearchWorker(run.root, 1, log.append)
    worker._engine.max_rows = 64
    try:
        return [len(claimed) for _ in results_of(worker, items())], log
    finally:
        worker.close()


def nodes(run: Run) -> list[Node]:
    return [node for part in run.ledger_parts(1) for node in tables.read_nodes(part)]


def assert_same(found: Sequence[Node], expected: Sequence[Node]) -> None:
    def without_numbers(node: Node) -> tuple[Any, ...]:
        return node.prompt_id, node.node_id, node.token_ids, node.text, node.finish, node.status

    assert list(map(without_numbers, found)) == list(map(without_numbers, expected))
    for left, right in zip(found, expected, strict=True):
        assert left.cosines == pytest.approx(right.cosines, abs=TOLERANCE)
        assert left.token_logprobs == pytest.approx(right.token_logprobs, abs=TOLERANCE)


def test_items_begin_before_earlier_ones_end(
    made: Run, run: Run, claimed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_claimed, _ = search(run, claimed, monkeypatch)
    assert len(num_claimed) == NUM_ITEMS
    assert num_claimed[0] > 1, "with 64 rows, the first item leaves room for the next"
    assert [part.name for part in run.ledger_parts(1)] == [part.name for part in made.ledger_parts(1)]
    assert_same(nodes(run), nodes(made))


def test_parts_that_exist_are_kept_and_the_others_are_the_same(
    made: Run, run: Run, claimed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = made.ledger_parts(1)[1]
    folder = run.iteration(1) / "ledger"
    folder.mkdir(parents=True)
    shutil.copy2(kept, folder)
    before = (folder / kept.name).stat().st_mtime_ns
    num_claimed, _ = search(run, claimed, monkeypatch)
    assert len(num_claimed) == NUM_ITEMS
    assert (folder / kept.name).stat().st_mtime_ns == before
    assert_same(nodes(run), nodes(made))


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Call what the list holds before each choice of tokens."""
    calls: list[Any] = []
    original = TokenSampler.choose

    def patched(self: TokenSampler, logits: torch.Tensor, candidates: Sequence[PartialCandidate]) -> torch.Tensor:
        for call in calls:
            call(candidates)
        return original(self, logits, candidates)

    monkeypatch.setattr(TokenSampler, "choose", patched)
    return calls


def test_a_prompt_that_fails_costs_only_itself(
    made: Run, run: Run, claimed: list[int], choose: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = [prompt.prompt_id for prompt in run.prompts()][5]

    def fail(candidates: Sequence[PartialCandidate]) -> None:
        if any(candidate.prompt_id == bad for candidate in candidates):
            raise ValueError("odd numbers")

    choose.append(fail)
    num_claimed, log = search(run, claimed, monkeypatch)
    assert len(num_claimed) == NUM_ITEMS
    assert set(run.failed_prompts(1)) == {bad}
    assert any(bad in line and "odd numbers" in line for line in log)
    assert_same(nodes(run), [node for node in nodes(made) if node.prompt_id != bad])


@pytest.mark.parametrize("across", ["on", "off"])
def test_rows_shrink_when_memory_runs_out(
    made: Run, run: Run, claimed: list[int], choose: list[Any], monkeypatch: pytest.MonkeyPatch, across: str
) -> None:
    run = with_items(run, across)

    def run_out(candidates: Sequence[PartialCandidate]) -> None:
        if len(candidates) > 8:
            raise torch.OutOfMemoryError("out of memory")

    choose.append(run_out)
    _, log = search(run, claimed, monkeypatch)
    lines = [
        f"out of memory in the search: at most {rows} rows are decoded at once from now on" for rows in (32, 16, 8)
    ]
    assert log
    assert log == lines[: len(log)]
    assert_same(nodes(run), nodes(made))


def test_memory_that_is_too_small_for_one_row_is_an_error(
    run: Run, claimed: list[int], choose: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(candidates: Sequence[PartialCandidate]) -> None:
        if len(candidates) > 2:  # two decode before the search, when the model is checked
            raise torch.OutOfMemoryError("out of memory")

    choose.append(run_out)
    with pytest.raises(torch.OutOfMemoryError):
        search(run, claimed, monkeypatch)


def test_other_errors_stop_the_stream(
    run: Run, claimed: list[int], choose: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(candidates: Sequence[PartialCandidate]) -> None:
        raise CsrError("the disk is full", "delete something")

    choose.append(fail)
    with pytest.raises(CsrError, match="disk is full"):
        search(run, claimed, monkeypatch)


def test_only_devices_that_gain_from_it_share_rows(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TransformersEngine(policy)
    assert not engine.gains_from_more_prompts
    monkeypatch.setattr("csr_vlm.generation.transformers_engine.is_gpu", lambda device: True)
    assert engine.gains_from_more_prompts
