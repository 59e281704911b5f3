"""Run tasks on the processes that torchrun or accelerate launched.

Rank 0 leads: it runs the command as a single process would and sends the other ranks orders
when there is work for them. They own no state, print nothing and decide nothing, so no two
processes can disagree. Besides the run directory they share only the launcher's key-value
store:

    order/N         order number N: map a task over its items, run one in all processes, or end
    N/next          number of items claimed; a process claims an item by incrementing it
    N/amount        progress of all processes
    N/tally/R       counts of rank R, once no item is left
    beat/R          heartbeat of rank R, incremented every few seconds
    failed          first process that failed, and its error

The store's increment is atomic, so each item is claimed once. If a process dies, the others
see its failure or miss its heartbeat and end. Its finished items are on disk, and the same
command resumes from them with any number of processes.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Progress, SilentProgress
from csr_vlm.scale.executor import Tally, Task, add_counts, require_marker, write_marker

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

PATIENCE = "CSR_RANK_PATIENCE"
"""Environment variable: seconds without a sign of life after which a process counts as dead."""
_DEFAULT_PATIENCE = 300.0
_LOOK_EVERY = 0.5
"""Most seconds between looks at the other processes while waiting for them."""
_GO_ON = "the same command goes on where this one stopped, with any number of processes"
_LEADER = 0


def num_launched() -> int:
    """Count the processes of the launcher that started this one; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


class FollowerFinished(SystemExit):
    """Ends a launched process that is not the leader, with exit code 0, after the leader ended the run."""


@contextmanager
def launched(workers: Sequence[Callable[..., Any]]) -> Iterator[TorchrunExecutor]:
    """Join the launched processes and give the leader, rank 0, their executor.

    Args:
        workers: Classes and functions that a task may name.

    Raises:
        FollowerFinished: In every other process, once the leader has ended the run.
        CsrError: Another process failed or stopped responding.
    """
    with _contact() as contact:
        if contact.rank == _LEADER:
            executor = TorchrunExecutor(contact)
            yield executor
            executor.end()
            return
        _follow(contact, {worker.__name__: worker for worker in workers})
    raise FollowerFinished(0)


@contextmanager
def _contact() -> Iterator[Contact]:
    """Join the launcher's store, with a device of one's own, and tell the others of any failure."""
    import torch
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        store, rank, size = next(rendezvous("env://"))
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CsrError(
            f"the launcher's other processes cannot be reached: {reason}", "start them by torchrun"
        ) from None
    # A launcher that starts its processes again gives them a number.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    contact = Contact(PrefixStore(f"csr/{attempt}", store), rank, size)
    try:
        yield contact
    except BaseException as error:
        contact.report_failure(error)
        raise
    finally:
        contact.close()
        if distributed.is_initialized():
            distributed.destroy_process_group()


class Contact:
    """What one process knows of the others, by the store that they share.

    Args:
        store: Of the launcher.
        rank: Which process this is, from 0.
        size: How many there are.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.name = f"rank {rank} of {size} on {socket.gethostname()}"
        self._patience = float(os.environ.get(PATIENCE, _DEFAULT_PATIENCE))
        self._store = store
        self._heard: dict[int, tuple[int, float]] = {}
        """By rank, its last beat and when that was first seen here."""
        self._closing = threading.Event()
        # A connection of its own, so that waiting here does not silence the beat.
        own: Store = store.clone()  # type: ignore[attr-defined]
        threading.Thread(target=self._beat, args=(own,), daemon=True).start()

    def _beat(self, store: Store) -> None:
        while not self._closing.is_set():
            try:
                store.add(f"beat/{self.rank}", 1)
            except RuntimeError:
                return  # the store is gone, which the waiting side words
            self._closing.wait(min(self._patience / 10, 10.0))

    def close(self) -> None:
        self._closing.set()

    def add(self, key: str, amount: int) -> int:
        """Count up, atomically, and return the sum; adding 0 reads it."""
        with _leader_errors():
            return int(self._store.add(key, amount))

    def put(self, key: str, value: Any) -> None:
        with _leader_errors():
            self._store.set(key, json.dumps(value))

    def get(self, key: str, ranks: Sequence[int], meanwhile: Callable[[], None] = lambda: None) -> Any:
        """Wait for a value.

        Args:
            ranks: Whose it may be; waiting ends when one of them is gone.
            meanwhile: Called every now and then.

        Raises:
            CsrError: Some process failed, or one of ``ranks`` has not been heard of for too long.
        """
        pause = 0.01
        while not self._has(key):
            self.look_at(ranks)
            meanwhile()
            time.sleep(pause)
            pause = min(2 * pause, _LOOK_EVERY)
        with _leader_errors():
            return json.loads(self._store.get(key))

    def _has(self, key: str) -> bool:
        with _leader_errors():
            return bool(self._store.check([key]))

    def look_at(self, ranks: Sequence[int]) -> None:
        """Refuse to go on without a process that is gone.

        Raises:
            CsrError: Some process failed, or one of ``ranks`` has not been heard of for too long.
        """
        if self._has("failed"):
            with _leader_errors():
                failure = json.loads(self._store.get("failed"))
            raise CsrError(f"{failure['who']} failed: {failure['message']}", failure["hint"] or _GO_ON)
        now = time.monotonic()
        for rank in ranks:
            beat = self.add(f"beat/{rank}", 0)
            last, since = self._heard.get(rank, (-1, now))
            if beat != last:
                self._heard[rank] = (beat, now)
            elif now - since > self._patience:
                raise CsrError(
                    f"rank {rank} of {self.size} has given no sign of life for {self._patience:g} s",
                    f"see what it wrote last; {_GO_ON}",
                )

    def report_failure(self, error: BaseException) -> None:
        """Let the others know why this process ends."""
        message = error.message if isinstance(error, CsrError) else f"{type(error).__name__}: {error}".split("\n")[0]
        failure = {"who": self.name, "message": message, "hint": getattr(error, "hint", "")}
        try:
            # Those who end because of a failure do not report one of their own.
            if self.add("failures", 1) == 1:
                self.put("failed", failure)
        except CsrError:
            pass  # nobody is left to be told


class TorchrunExecutor:
    """The launched processes, as the leading one sees them."""

    def __init__(self, contact: Contact) -> None:
        self._contact = contact
        self._others = range(1, contact.size)
        self._orders = count()
        self._tokens: dict[Path, str] = {}

    def map(self, task: Task, progress: Progress, log: Callable[[str], None]) -> Tally:
        number = self._order("map", task)
        shown = 0

        def show() -> None:
            nonlocal shown
            amount = self._contact.add(f"{number}/amount", 0)
            progress.advance(amount - shown)
            shown = amount

        def after_each() -> None:
            self._contact.look_at(self._others)
            show()

        tally = _take_items(task, number, self._contact, log, after_each)
        for rank in self._others:
            add_counts(tally, self._contact.get(f"{number}/tally/{rank}", self._others, show))
        show()
        return tally

    def run_all(self, task: Task, progress: Progress) -> Any:
        number = self._order("run_all", task)
        with _explain_lost_process(self._contact, self._others):
            result = task.make(task.root, processes=self._contact.size, progress=progress, **task.settings)
        for rank in self._others:
            self._contact.get(f"{number}/tally/{rank}", self._others)
        return result

    def end(self) -> None:
        """Send the others home."""
        number = next(self._orders)
        self._contact.put(f"order/{number}", {"kind": "end"})
        # This process may be the one that keeps the store.
        for rank in self._others:
            self._contact.get(f"{number}/tally/{rank}", self._others)

    def _order(self, kind: str, task: Task) -> int:
        number = next(self._orders)
        root = task.root.resolve()
        if root not in self._tokens:
            self._tokens[root] = write_marker(root)
        order = {
            "kind": kind,
            "make": task.make.__name__,
            "root": str(root),
            "token": self._tokens[root],
            "settings": dict(task.settings),
            "num_items": task.num_items,
        }
        self._contact.put(f"order/{number}", order)
        return number


def _follow(contact: Contact, workers: Mapping[str, Callable[..., Any]]) -> None:
    """Do what the leader orders until it says that all is done."""
    for number in count():
        order = contact.get(f"order/{number}", [_LEADER])
        tally: Tally = {}
        if order["kind"] != "end":
            task = Task(workers[order["make"]], Path(order["root"]), order["settings"], order["num_items"])
            require_marker(task.root, order["token"], contact.name)
            if order["kind"] == "map":
                tally = _take_items(task, number, contact, _discard, lambda: contact.look_at([_LEADER]))
            else:
                with _explain_lost_process(contact, [_LEADER]):
                    task.make(task.root, processes=contact.size, progress=SilentProgress(), **task.settings)
        contact.put(f"{number}/tally/{contact.rank}", tally)
        if order["kind"] == "end":
            return


def _take_items(
    task: Task, number: int, contact: Contact, log: Callable[[str], None], after_each: Callable[[], None]
) -> Tally:
    """Do items that nobody has taken until there are none."""
    tally: Tally = {}
    with closing(task.make(task.root, log=log, **task.settings)) as work:
        while (item := contact.add(f"{number}/next", 1) - 1) < task.num_items:
            done = work.run_item(item)
            add_counts(tally, done.tally)
            contact.add(f"{number}/amount", done.amount)
            after_each()
    return tally


@contextmanager
def _explain_lost_process(contact: Contact, others: Sequence[int]) -> Iterator[None]:
    """Say which process is gone where a collective operation only says that a connection is."""
    try:
        yield
    except RuntimeError as error:
        time.sleep(2 * _LOOK_EVERY)  # whoever failed may still be about to say so
        contact.look_at(others)
        reason = str(error).strip().splitlines()[0]
        if "onnection" in reason:
            raise CsrError(f"a process was lost in training: {reason}", _GO_ON) from error
        raise


@contextmanager
def _leader_errors() -> Iterator[None]:
    from torch.distributed import DistError

    try:
        yield
    except DistError:
        _lost()


def _lost() -> NoReturn:
    raise CsrError("the process that keeps the others together is gone", _GO_ON) from None


def _discard(text: str) -> None:
    pass
