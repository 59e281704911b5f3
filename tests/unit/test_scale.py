"""Run work items on several processes: each item runs once, and lost processes are noticed."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore

from csr_vlm.cli import executors
from csr_vlm.cli.executors import num_processes
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Progress, SilentProgress
from csr_vlm.scale import torchrun as module
from csr_vlm.scale.executor import LOCAL, ItemResult, Task, add_counts, require_marker, write_marker
from csr_vlm.scale.launch import launch
from csr_vlm.scale.ray import Actor
from csr_vlm.scale.torchrun import StoreClient, TorchrunExecutor, num_launched
from csr_vlm.store import parts
from csr_vlm.training.distribution import (
    refuse_ram_efficient_loading,
    requested_distribution,
    require_distribution,
)
from tests.unit.builders import CountedProgress


class Letters:
    """Write one file per item and count its letter; fail at an exclamation mark."""

    def __init__(self, root: Path, text: str, log: Callable[[str], None], slow: float = 0.0) -> None:
        self.root, self.text, self.slow = root, text, slow

    def run_item(self, item: int) -> ItemResult:
        if self.text[item] == "!":
            raise CsrError("an exclamation mark", "write without")
        time.sleep(self.slow)
        with (self.root / f"{item}.txt").open("a") as file:
            file.write(self.text[item])
        return ItemResult(10, {"letters": Counter(self.text[item])})

    def close(self) -> None:
        (self.root / f"closed-{os.getpid()}-{threading.get_ident()}").touch()


def meet(root: Path, processes: int, progress: Progress, word: str) -> str:
    """Leave one file per process."""
    (root / f"{word}-{processes}-{threading.get_ident()}").touch()
    progress.advance(1)
    return word.upper()


class Model:
    """Refer to itself, as a model with a replaced method does."""

    def __init__(self) -> None:
        self.forward = self


class Holder(Letters):
    """Hold such a model."""

    def __init__(self, root: Path, text: str, log: Callable[[str], None]) -> None:
        super().__init__(root, text, log)
        self._model = Model()
        MODELS.append(weakref.ref(self._model))


MODELS: list[weakref.ref[Model]] = []
TARGETS = {"Letters": Letters, "meet": meet, "Holder": Holder}


class Ranks:
    """Run the leader in this thread and the followers in threads of their own, with one store."""

    def __init__(self, size: int) -> None:
        self.store = HashStore()
        self.errors: dict[int, CsrError] = {}
        self.clients = [StoreClient(self.store, rank, size) for rank in range(size)]
        self.executor = TorchrunExecutor(self.clients[0])
        self.threads = [threading.Thread(target=self.follow, args=(c,), daemon=True) for c in self.clients[1:]]

    def follow(self, client: StoreClient) -> None:
        try:
            module._follow(client, TARGETS)
        except CsrError as error:
            client.report_failure(error)
            self.errors[client.rank] = error

    def start(self) -> TorchrunExecutor:
        for thread in self.threads:
            thread.start()
        return self.executor

    def join(self) -> None:
        for thread in self.threads:
            thread.join(timeout=10)
        assert not any(thread.is_alive() for thread in self.threads)


@pytest.fixture(autouse=True)
def _short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(module.TIMEOUT_VARIABLE, "1.5")
    monkeypatch.setattr(module, "_POLL_INTERVAL", 0.02)


def discard(text: str) -> None:
    pass


def written(root: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in root.glob("*.txt")}


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_item_runs_once_for_any_number_of_processes(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seven threads of one process collect garbage in turn, and nobody's heartbeats go out meanwhile.
    monkeypatch.setenv(module.TIMEOUT_VARIABLE, "20")
    text = "abracadabra"
    advances: list[int] = []
    task = Task(Letters, tmp_path, {"text": text, "slow": 0.003}, len(text))
    ranks = Ranks(size)
    executor = ranks.start()
    counts = executor.map(task, CountedProgress(advances), discard)
    more_counts = executor.map(Task(Letters, tmp_path, {"text": "xy"}, 2), CountedProgress(advances), discard)
    executor.end()
    ranks.join()
    # a five times, b and r twice, c and d once.
    assert counts == {"letters": Counter(a=5, b=2, r=2, c=1, d=1)}
    assert more_counts == {"letters": Counter(x=1, y=1)}
    # The first two files have two letters because the second task ran items 0 and 1 again.
    assert written(tmp_path) == {f"{i}.txt": c for i, c in enumerate(text)} | {"0.txt": "ax", "1.txt": "by"}
    assert sum(advances) == 10 * (len(text) + 2)
    assert ranks.errors == {}


def test_the_local_executor_gives_the_same_result(tmp_path: Path) -> None:
    advances: list[int] = []
    counts = LOCAL.map(Task(Letters, tmp_path, {"text": "abba"}, 4), CountedProgress(advances), discard)
    assert counts == {"letters": Counter(a=2, b=2)}
    assert advances == [10, 10, 10, 10]
    assert LOCAL.run_all(Task(meet, tmp_path, {"word": "here"}), CountedProgress(advances)) == "HERE"


def test_run_all_runs_in_every_process_and_returns_the_leaders_result(tmp_path: Path) -> None:
    ranks = Ranks(3)
    executor = ranks.start()
    assert executor.run_all(Task(meet, tmp_path, {"word": "now"}), SilentProgress()) == "NOW"
    executor.end()
    ranks.join()
    assert len(list(tmp_path.glob("now-3-*"))) == 3


def test_followers_free_their_models_before_the_next_order(tmp_path: Path) -> None:
    ranks = Ranks(3)
    executor = ranks.start()
    MODELS.clear()
    gc.disable()
    try:
        executor.map(Task(Holder, tmp_path, {"text": "abcdef"}, 6), SilentProgress(), discard)
        assert len(MODELS) == 3
        # The leader's loop frees its own.
        assert sum(reference() is not None for reference in MODELS) <= 1
    finally:
        gc.enable()
    executor.end()
    ranks.join()


def test_a_failure_in_one_process_ends_all_with_its_message(tmp_path: Path) -> None:
    ranks = Ranks(3)
    # The leader is busy with its item, so a follower claims the item that fails.
    with pytest.raises(CsrError) as caught:
        ranks.start().map(Task(Letters, tmp_path, {"text": "ab!cdefgh", "slow": 0.05}, 9), SilentProgress(), discard)
    ranks.clients[0].report_failure(caught.value)
    ranks.join()
    texts = [str(error) for error in (caught.value, *ranks.errors.values())]
    assert all("an exclamation mark" in text for text in texts)
    assert len(ranks.errors) == 2
    assert len(written(tmp_path)) < 9


def test_waiting_for_a_process_without_heartbeats_ends_at_the_timeout(tmp_path: Path) -> None:
    ranks = Ranks(2)
    ranks.clients[1].close()  # it sends no heartbeats and follows no orders
    started = time.monotonic()
    with pytest.raises(CsrError, match=r"rank 1 of 2 has sent no heartbeat for 1\.5 s"):
        ranks.executor.map(Task(Letters, tmp_path, {"text": "abc"}, 3), SilentProgress(), discard)
    assert time.monotonic() - started < 8
    # Finished items stay on disk for the next run.
    assert written(tmp_path) == {"0.txt": "a", "1.txt": "b", "2.txt": "c"}


def test_a_slow_process_with_heartbeats_is_waited_for(tmp_path: Path) -> None:
    ranks = Ranks(2)
    counts = ranks.start().map(Task(Letters, tmp_path, {"text": "abc", "slow": 2.0}, 3), SilentProgress(), discard)
    assert counts["letters"].total() == 3


def test_followers_end_if_the_leader_is_lost() -> None:
    ranks = Ranks(2)
    ranks.clients[0].close()
    ranks.threads[0].start()
    ranks.join()
    assert "rank 0 of 2 has sent no heartbeat" in str(ranks.errors[1])


def test_a_lost_process_is_named_by_its_heartbeats_not_by_an_error_message() -> None:
    ranks = Ranks(3)
    peers = ranks.executor._followers
    with pytest.raises(RuntimeError, match="Connection closed"), module._explain_lost_process(ranks.clients[0], peers):
        raise RuntimeError("Connection closed by peer")
    ranks.clients[2].close()
    time.sleep(0.2)  # the last heartbeat may still be on its way
    with (
        pytest.raises(CsrError, match="rank 2 of 3 was lost in training: whatever torch says"),
        module._explain_lost_process(ranks.clients[0], peers),
    ):
        raise RuntimeError("whatever torch says")


def test_a_failure_explains_the_error_of_a_collective_operation() -> None:
    ranks = Ranks(2)
    ranks.clients[1].report_failure(CsrError("no memory", "buy some"))
    with (
        pytest.raises(CsrError, match="failed: no memory"),
        module._explain_lost_process(ranks.clients[0], [1]),
    ):
        raise RuntimeError("Connection closed by peer")


class Broken:
    """Fail in the constructor."""

    def __init__(self, root: Path, log: Callable[[str], None]) -> None:
        raise CsrError("no such model", "name another")


def test_an_actor_returns_errors_as_rows(tmp_path: Path) -> None:
    token = write_marker(tmp_path)
    actor = Actor(Letters, str(tmp_path), token, {"text": "a!b"})
    assert actor({"id": 0}) == {"num_finished": 10, "counts": '{"letters": {"a": 1}}', "error": "", "hint": ""}
    failed = {"num_finished": 0, "counts": "{}", "error": "an exclamation mark", "hint": "write without"}
    assert actor({"id": 1}) == failed
    assert actor({"id": 2}) == failed, "nothing runs after an error"
    assert not (tmp_path / "2.txt").exists()
    broken = Actor(Broken, str(tmp_path), token, {})
    assert broken({"id": 0})["error"] == "no such model"


def test_a_different_directory_at_the_same_path_is_rejected(tmp_path: Path) -> None:
    token = write_marker(tmp_path)
    require_marker(tmp_path, token, "rank 1", timeout=0)
    new_token = write_marker(tmp_path)
    with pytest.raises(CsrError, match="rank 1 sees a different"):
        require_marker(tmp_path, token, "rank 1", timeout=0)
    with pytest.raises(CsrError, match="rank 2 sees a different"):
        require_marker(tmp_path / "nowhere", new_token, "rank 2", timeout=0)


def test_counts_add_up_and_keep_zeros() -> None:
    counts: dict[str, Counter[str]] = {}
    add_counts(counts, {"statuses": {"top": 2}, "long": {"clip": 0}})
    add_counts(counts, {"statuses": {"top": 1, "bottom": 4}, "long": {"clip": 0}})
    assert counts == {"statuses": {"top": 3, "bottom": 4}, "long": {"clip": 0}}
    assert "clip" in counts["long"]


def test_a_launcher_is_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # set, but not by a launcher
    assert num_launched() == 1
    monkeypatch.setenv("RANK", "0")
    assert num_launched() == 4


def state(kind: str, processes: int) -> Any:
    return SimpleNamespace(distributed_type=SimpleNamespace(value=kind), num_processes=processes)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_distribution_must_be_the_requested_one(environment: pytest.MonkeyPatch) -> None:
    assert require_distribution(state("NO", 1), 1) == "NO"
    assert require_distribution(state("MULTI_CPU", 2), 2) == "MULTI_CPU"
    with pytest.raises(CsrError, match="DDP over 2 processes was requested, but accelerate set up NO over 1"):
        require_distribution(state("NO", 1), 2)
    environment.setenv("ACCELERATE_USE_FSDP", "true")
    assert requested_distribution(2) == "FSDP"
    assert require_distribution(state("FSDP", 2), 2) == "FSDP"
    # accelerate silently replaces FSDP on a CPU.
    with pytest.raises(CsrError, match="FSDP over 2 processes was requested, but accelerate set up MULTI_CPU over 2"):
        require_distribution(state("MULTI_CPU", 2), 2)
    environment.delenv("ACCELERATE_USE_FSDP")
    environment.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert require_distribution(state("DEEPSPEED", 4), 4) == "DEEPSPEED"
    with pytest.raises(CsrError, match="DEEPSPEED over 4"):
        require_distribution(state("DEEPSPEED", 2), 4)


def test_weights_that_only_rank_0_loads_are_rejected(environment: pytest.MonkeyPatch) -> None:
    refuse_ram_efficient_loading()
    environment.setenv("ACCELERATE_USE_FSDP", "true")
    refuse_ram_efficient_loading()
    environment.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(CsrError, match="without weights to generate with"):
        refuse_ram_efficient_loading()


def test_parts_that_are_listed_late_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system may list what other machines wrote only later; a part must not be lost by that."""
    for item in range(3):
        (tmp_path / parts.part_name(item, "0" * 16)).touch()
    list_parts, listings = parts.list_parts, iter([1, 2, 3])

    def stale(directory: Path) -> tuple[list[Path], list[Path]]:
        return list_parts(directory)[0][: next(listings)], []

    monkeypatch.setattr(parts, "list_parts", stale)
    assert len(parts.wait_for_parts(tmp_path, 3)) == 3
    monkeypatch.setattr(parts, "list_parts", list_parts)
    with pytest.raises(CsrError, match=r"lists 3 of 4 parts that were written"):
        parts.wait_for_parts(tmp_path, 4, timeout=0)


@pytest.fixture
def signals() -> Iterator[None]:
    """Restore the handlers that torch's launcher replaces."""
    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in handled}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
def test_launched_processes_end_together() -> None:
    def process(of_rank_1: str) -> list[str]:
        return ["-c", f"import os, sys, time\nif os.environ['RANK'] == '1': {of_rank_1}\nelse: time.sleep(60)"]

    assert launch(2, process("sys.exit(3)")) == 3
    with pytest.raises(CsrError, match="process 1 of 2 was killed by SIGKILL"):
        launch(2, process("os.kill(os.getpid(), 9)"))
    assert launch(2, ["-c", "import os; assert os.environ['WORLD_SIZE'] == '2'"]) == 0


def test_gpus_are_counted_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, device, number in ((None, "auto", 1), ("3", "cpu", 3), ("auto", "cpu", 1), ("1", "auto", 1)):
        assert num_processes(gpus, device) == number
    with pytest.raises(CsrError, match="torch sees 0") as caught:
        num_processes("2", "auto")
    assert "model.device=cpu" in caught.value.hint
    monkeypatch.setattr(executors, "count_gpus", lambda: 4)
    assert [num_processes(gpus, "auto") for gpus in ("auto", "2")] == [4, 2]
    for gpus, device, reason in (("5", "auto", "sees 4"), ("0", "auto", "number"), ("2", "cuda:1", "combined")):
        with pytest.raises(CsrError, match=reason):
            num_processes(gpus, device)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert num_processes("4", "auto") == 1, "a launcher has started this process"
