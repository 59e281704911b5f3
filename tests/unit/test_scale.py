"""Work items over several processes: each done once, whoever does it, and no one waits for the dead."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore

from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Progress, SilentProgress
from csr_vlm.scale import torchrun as module
from csr_vlm.scale.executor import LOCAL, ItemResult, Task, add_counts, require_marker, write_marker
from csr_vlm.scale.torchrun import Contact, TorchrunExecutor, num_launched
from csr_vlm.training.distribution import (
    per_process_batch,
    refuse_ram_efficient_loading,
    requested_distribution,
    require_distribution,
)
from tests.unit.builders import CountedProgress


class Letters:
    """Each item writes a file and says which letter it was."""

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
    """All come here together."""
    (root / f"{word}-{processes}-{threading.get_ident()}").touch()
    progress.advance(1)
    return word.upper()


MAKERS = {"Letters": Letters, "meet": meet}


class Crowd:
    """The leader in this thread and the others in threads of their own, around one store."""

    def __init__(self, size: int) -> None:
        self.store = HashStore()
        self.errors: dict[int, CsrError] = {}
        self.contacts = [Contact(self.store, rank, size) for rank in range(size)]
        self.ranks = TorchrunExecutor(self.contacts[0])
        self.threads = [threading.Thread(target=self.follow, args=(c,), daemon=True) for c in self.contacts[1:]]

    def follow(self, contact: Contact) -> None:
        try:
            module._follow(contact, MAKERS)
        except CsrError as error:
            contact.report_failure(error)
            self.errors[contact.rank] = error

    def start(self) -> TorchrunExecutor:
        for thread in self.threads:
            thread.start()
        return self.ranks

    def join(self) -> None:
        for thread in self.threads:
            thread.join(timeout=10)
        assert not any(thread.is_alive() for thread in self.threads)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(module.PATIENCE, "1.5")
    monkeypatch.setattr(module, "_LOOK_EVERY", 0.02)


def quiet(text: str) -> None:
    pass


def written(root: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in root.glob("*.txt")}


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_item_is_done_once_however_many_there_are(tmp_path: Path, size: int) -> None:
    text = "abracadabra"
    shown: list[int] = []
    task = Task(Letters, tmp_path, {"text": text, "slow": 0.003}, len(text))
    crowd = Crowd(size)
    ranks = crowd.start()
    tally = ranks.map(task, CountedProgress(shown), quiet)
    again = ranks.map(Task(Letters, tmp_path, {"text": "xy"}, 2), CountedProgress(shown), quiet)
    ranks.end()
    crowd.join()
    # a five times, b and r twice, c and d once.
    assert tally == {"letters": Counter(a=5, b=2, r=2, c=1, d=1)}
    assert again == {"letters": Counter(x=1, y=1)}
    # Twice only where the second job said so.
    assert written(tmp_path) == {f"{i}.txt": c for i, c in enumerate(text)} | {"0.txt": "ax", "1.txt": "by"}
    assert sum(shown) == 10 * (len(text) + 2)
    assert crowd.errors == {}


def test_one_process_does_the_same_alone(tmp_path: Path) -> None:
    shown: list[int] = []
    tally = LOCAL.map(Task(Letters, tmp_path, {"text": "abba"}, 4), CountedProgress(shown), quiet)
    assert tally == {"letters": Counter(a=2, b=2)}
    assert shown == [10, 10, 10, 10]
    assert LOCAL.run_all(Task(meet, tmp_path, {"word": "here"}), CountedProgress(shown)) == "HERE"


def test_all_meet_and_the_leader_hears_what_came_of_it(tmp_path: Path) -> None:
    crowd = Crowd(3)
    ranks = crowd.start()
    assert ranks.run_all(Task(meet, tmp_path, {"word": "now"}), SilentProgress()) == "NOW"
    ranks.end()
    crowd.join()
    assert len(list(tmp_path.glob("now-3-*"))) == 3


def test_a_failure_of_one_ends_all_with_its_words(tmp_path: Path) -> None:
    crowd = Crowd(3)
    # The leader takes long over its item, so one of the others meets the mark.
    with pytest.raises(CsrError) as found:
        crowd.start().map(Task(Letters, tmp_path, {"text": "ab!cdefgh", "slow": 0.05}, 9), SilentProgress(), quiet)
    crowd.contacts[0].report_failure(found.value)
    crowd.join()
    texts = [str(error) for error in (found.value, *crowd.errors.values())]
    assert all("an exclamation mark" in text for text in texts)
    assert len(crowd.errors) == 2
    assert len(written(tmp_path)) < 9


def test_a_silent_process_is_not_waited_for_forever(tmp_path: Path) -> None:
    crowd = Crowd(2)
    crowd.contacts[1].close()  # it beats no more and takes no order
    started = time.monotonic()
    with pytest.raises(CsrError, match=r"rank 1 of 2 has given no sign of life for 1\.5 s"):
        crowd.ranks.map(Task(Letters, tmp_path, {"text": "abc"}, 3), SilentProgress(), quiet)
    assert time.monotonic() - started < 8
    # What was done is there, for the next start.
    assert written(tmp_path) == {"0.txt": "a", "1.txt": "b", "2.txt": "c"}


def test_a_slow_process_is_waited_for(tmp_path: Path) -> None:
    crowd = Crowd(2)
    tally = crowd.start().map(Task(Letters, tmp_path, {"text": "abc", "slow": 2.0}, 3), SilentProgress(), quiet)
    assert tally["letters"].total() == 3


def test_a_leader_that_is_gone_is_not_waited_for() -> None:
    crowd = Crowd(2)
    crowd.contacts[0].close()
    crowd.threads[0].start()
    crowd.join()
    assert "rank 0 of 2 has given no sign of life" in str(crowd.errors[1])


def test_another_directory_of_the_same_name_is_refused(tmp_path: Path) -> None:
    mark = write_marker(tmp_path)
    require_marker(tmp_path, mark, "rank 1", patience=0)
    later = write_marker(tmp_path)
    with pytest.raises(CsrError, match="rank 1 sees another"):
        require_marker(tmp_path, mark, "rank 1", patience=0)
    with pytest.raises(CsrError, match="rank 2 sees another"):
        require_marker(tmp_path / "nowhere", later, "rank 2", patience=0)


def test_tallies_add_up_and_keep_what_is_zero() -> None:
    tally: dict[str, Counter[str]] = {}
    add_counts(tally, {"statuses": {"top": 2}, "long": {"clip": 0}})
    add_counts(tally, {"statuses": {"top": 1, "bottom": 4}, "long": {"clip": 0}})
    assert tally == {"statuses": {"top": 3, "bottom": 4}, "long": {"clip": 0}}
    assert "clip" in tally["long"]


def test_a_launcher_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # left over from somewhere
    assert num_launched() == 1
    monkeypatch.setenv("RANK", "0")
    assert num_launched() == 4


@pytest.mark.parametrize(
    ("batch", "accumulation", "processes", "expected"),
    [
        (2, 8, 1, (2, 8)),
        (2, 8, 4, (2, 2)),  # 16 pairs a step, 4 a process: two at a time, twice
        (2, 8, 16, (1, 1)),
        (16, 1, 4, (4, 1)),
        (6, 2, 4, (3, 1)),  # 12 pairs, 3 a process
        (4, 6, 8, (3, 1)),
        (1, 16, 8, (1, 2)),
    ],
)
def test_a_step_takes_as_many_pairs_however_many_processes_share_it(
    batch: int, accumulation: int, processes: int, expected: tuple[int, int]
) -> None:
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    dealt = per_process_batch(dict(zip(names, (batch, accumulation), strict=True)), processes)
    assert tuple(dealt[name] for name in names) == expected
    assert dealt[names[0]] * dealt[names[1]] * processes == batch * accumulation
    assert dealt[names[0]] <= batch


def test_a_step_that_cannot_be_dealt_out_is_refused() -> None:
    with pytest.raises(CsrError, match="a step of 1 pairs cannot be split evenly among 2 processes"):
        per_process_batch({"per_device_train_batch_size": 1}, 2)


def state(kind: str, processes: int) -> Any:
    return SimpleNamespace(distributed_type=SimpleNamespace(value=kind), num_processes=processes)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_distribution_is_the_one_asked_for(environment: pytest.MonkeyPatch) -> None:
    assert require_distribution(state("NO", 1), 1) == "NO"
    assert require_distribution(state("MULTI_CPU", 2), 2) == "MULTI_CPU"
    with pytest.raises(CsrError, match="DDP over 2 processes was requested, but accelerate set up NO over 1"):
        require_distribution(state("NO", 1), 2)
    environment.setenv("ACCELERATE_USE_FSDP", "true")
    assert requested_distribution(2) == "FSDP"
    assert require_distribution(state("FSDP", 2), 2) == "FSDP"
    # What accelerate does with FSDP on a CPU, without a word.
    with pytest.raises(CsrError, match="FSDP over 2 processes was requested, but accelerate set up MULTI_CPU over 2"):
        require_distribution(state("MULTI_CPU", 2), 2)
    environment.delenv("ACCELERATE_USE_FSDP")
    environment.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert require_distribution(state("DEEPSPEED", 4), 4) == "DEEPSPEED"
    with pytest.raises(CsrError, match="DEEPSPEED over 4"):
        require_distribution(state("DEEPSPEED", 2), 4)


def test_weights_that_only_the_first_process_reads_are_refused(environment: pytest.MonkeyPatch) -> None:
    refuse_ram_efficient_loading()
    environment.setenv("ACCELERATE_USE_FSDP", "true")
    refuse_ram_efficient_loading()
    environment.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(CsrError, match="without weights to generate with"):
        refuse_ram_efficient_loading()
