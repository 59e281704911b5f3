"""Run tasks on the processes that torchrun or accelerate launched.

Rank 0 is the leader: it runs the command as a single process would and sends orders to the other
ranks, the followers. Followers own no state, print nothing and make no decisions, so two
processes cannot disagree. Besides the run directory, the processes share only the launcher's
key-value store:

    order/N         order number N as JSON: map a task over its items, run one in all processes, or end
    N/next          number of items claimed; a process claims an item by incrementing it
    N/finished      progress, summed over all processes
    N/counts/R      counts of rank R as JSON, written when no item is left and the order is complete
    heartbeat/R     heartbeat of rank R, incremented every few seconds
    failures        number of processes that failed
    failed          name, message and hint of the first process that failed, as JSON

Keys are prefixed with the launcher's restart number. The store's increment is atomic, so each item
is claimed once. If a process dies, the others see its failure or miss its heartbeat, and end. Its
finished items are on disk, and the same command resumes from them with any number of processes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csr_vlm.core.errors import CsrError, reason_of
from csr_vlm.core.memory import free_memory
from csr_vlm.core.progress import Progress, SilentProgress
from csr_vlm.scale.executor import Counts, Task, add_counts, discard_log, require_marker, results_of, write_marker

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

TIMEOUT_VARIABLE = "CSR_RANK_PATIENCE"
"""Environment variable with the seconds without a heartbeat after which a process counts as lost."""
_DEFAULT_TIMEOUT = 300.0
_MAX_HEARTBEAT_INTERVAL = 10.0
_POLL_INTERVAL = 0.5
"""Longest time in seconds between two checks while waiting for other processes."""
_RESUME_HINT = "run the same command again to resume, with any number of processes"
_LEADER = 0


def num_launched() -> int:
    """Return the number of processes of the launcher that started this one; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


class FollowerFinished(SystemExit):
    """End a follower after the leader ended the run, or because another process has said why the run ends."""


class PeerFailure(CsrError):
    """Report that another process failed."""


@contextmanager
def torchrun_executor(targets: Sequence[Callable[..., Any]]) -> Iterator[TorchrunExecutor]:
    """Join the launched processes; yield their executor in the leader, and follow its orders elsewhere.

    Args:
        targets: Worker classes and functions that a task may have as its target.

    Raises:
        FollowerFinished: In every follower, after the leader ended the run or another process failed.
        CsrError: Another process failed or was lost.
    """
    code = 0
    with _join_store() as client:
        if client.rank == _LEADER:
            executor = TorchrunExecutor(client)
            yield executor
            executor.end()
            return
        # Ctrl-C reaches all processes; the leader finishes its item and ends the others.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            _follow(client, {target.__name__: target for target in targets})
        except PeerFailure:  # which that process and the leader print
            code = 1
    raise FollowerFinished(code)


@contextmanager
def _join_store() -> Iterator[StoreClient]:
    """Select this process's GPU, connect to the launcher's store, and report any failure to the other processes."""
    import torch
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        store, rank, size = next(rendezvous("env://"))
    except (RuntimeError, ValueError) as error:
        raise CsrError(
            f"the launcher's other processes cannot be reached: {reason_of(error)}", "start them with torchrun"
        ) from None
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    client = StoreClient(PrefixStore(f"csr/{restart}", store), rank, size)
    try:
        yield client
    except BaseException as error:
        client.report_failure(error)
        raise
    finally:
        client.close()
        if distributed.is_initialized():
            distributed.destroy_process_group()


class StoreClient:
    """Give one process access to the shared store, send its heartbeats, and watch those of its peers.

    Args:
        store: Key-value store of the launcher.
        rank: Index of this process, from 0.
        size: Number of processes.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.name = f"rank {rank} of {size} on {socket.gethostname()}"
        self._timeout = float(os.environ.get(TIMEOUT_VARIABLE, _DEFAULT_TIMEOUT))
        self._heartbeat_interval = min(self._timeout / 10, _MAX_HEARTBEAT_INTERVAL)
        self._store = store
        self._last_heartbeats: dict[int, tuple[int, float]] = {}
        """(last heartbeat, time when it was first seen here) by rank."""
        self._closing = threading.Event()
        # The heartbeat has a connection of its own, since a blocking call would delay it.
        connection: Store = store.clone()  # type: ignore[attr-defined]
        threading.Thread(target=self._send_heartbeats, args=(connection,), daemon=True).start()

    def close(self) -> None:
        """Stop sending heartbeats."""
        self._closing.set()

    def add(self, key: str, amount: int) -> int:
        """Increment a counter atomically and return its new value; add 0 to read it."""
        with _store_errors():
            return int(self._store.add(key, amount))

    def put(self, key: str, value: Any) -> None:
        """Store a value as JSON."""
        with _store_errors():
            self._store.set(key, json.dumps(value))

    def get(self, key: str, ranks: Sequence[int], on_poll: Callable[[], None] = lambda: None) -> Any:
        """Wait for a value and return it.

        Args:
            key: Key of the value.
            ranks: Processes to wait for; the wait ends if one of them is lost.
            on_poll: Called each time the store is checked.

        Raises:
            CsrError: A process failed, or one of ``ranks`` sent no heartbeat until the timeout.
        """
        pause = 0.01
        while not self._has(key):
            self.check_alive(ranks)
            on_poll()
            time.sleep(pause)
            pause = min(2 * pause, _POLL_INTERVAL)
        return self._read(key)

    def check_alive(self, ranks: Sequence[int]) -> None:
        """Check that no process has failed and that the given ones are alive.

        Raises:
            PeerFailure: A process failed.
            CsrError: One of ``ranks`` sent no heartbeat until the timeout.
        """
        if self._has("failed"):
            failure = self._read("failed")
            raise PeerFailure(f"{failure['process']} failed: {failure['message']}", failure["hint"] or _RESUME_HINT)
        now = time.monotonic()
        for rank in ranks:
            heartbeat = self._heartbeat(rank)
            last, since = self._last_heartbeats.get(rank, (-1, now))
            if heartbeat != last:
                self._last_heartbeats[rank] = (heartbeat, now)
            elif now - since > self._timeout:
                raise CsrError(
                    f"rank {rank} of {self.size} has sent no heartbeat for {self._timeout:g} s",
                    f"see the last lines of its output; {_RESUME_HINT}",
                )

    def silent_ranks(self, ranks: Sequence[int]) -> list[int]:
        """Watch the given processes for two heartbeat intervals; return those that sent no heartbeat.

        Raises:
            CsrError: A process failed.
        """
        before = {rank: self._heartbeat(rank) for rank in ranks}
        silent = set(ranks)
        deadline = time.monotonic() + 2 * self._heartbeat_interval
        # A process that failed may take a moment to report it, so wait once even if all heartbeats arrive.
        while True:
            time.sleep(_POLL_INTERVAL)
            self.check_alive(ranks)
            silent -= {rank for rank in silent if self._heartbeat(rank) != before[rank]}
            if not silent or time.monotonic() > deadline:
                return sorted(silent)

    def report_failure(self, error: BaseException) -> None:
        """Inform the other processes why this one ends."""
        message = error.message if isinstance(error, CsrError) else f"{type(error).__name__}: {error}".split("\n")[0]
        failure = {"process": self.name, "message": message, "hint": getattr(error, "hint", "")}
        try:
            # Only the first failure is reported; the other processes end because of it.
            if self.add("failures", 1) == 1:
                self.put("failed", failure)
        except CsrError:
            pass  # The store is gone, and with it the processes that could read the report.

    def _has(self, key: str) -> bool:
        with _store_errors():
            return bool(self._store.check([key]))

    def _read(self, key: str) -> Any:
        with _store_errors():
            return json.loads(self._store.get(key))

    def _heartbeat(self, rank: int) -> int:
        return self.add(f"heartbeat/{rank}", 0)

    def _send_heartbeats(self, store: Store) -> None:
        while not self._closing.is_set():
            try:
                store.add(f"heartbeat/{self.rank}", 1)
            except RuntimeError:
                return  # The store is gone; the main thread reports it.
            self._closing.wait(self._heartbeat_interval)


class TorchrunExecutor:
    """Run tasks on all launched processes, from the leader."""

    def __init__(self, client: StoreClient) -> None:
        self._client = client
        self._followers = range(1, client.size)
        self._order_numbers = count()
        self._tokens: dict[Path, str] = {}

    def map(self, task: Task, progress: Progress, log: Callable[[str], None]) -> Counts:
        number = self._send_order("map", task)
        shown = 0

        def show_progress() -> None:
            nonlocal shown
            finished = self._client.add(f"{number}/finished", 0)
            progress.advance(finished - shown)
            shown = finished

        def after_item() -> None:
            show_progress()  # Ends here after a signal, before a follower that the same signal ended is missed.
            self._client.check_alive(self._followers)

        counts = _run_items(task, number, self._client, log, after_item)
        for rank in self._followers:
            add_counts(counts, self._client.get(f"{number}/counts/{rank}", self._followers, show_progress))
        show_progress()
        return counts

    def run_all(self, task: Task, progress: Progress) -> Any:
        number = self._send_order("run_all", task)
        with _explain_lost_process(self._client, self._followers):
            result = task.target(task.root, processes=self._client.size, progress=progress, **task.settings)
        self._wait_for_followers(number)
        return result

    def end(self) -> None:
        """End the followers."""
        number = next(self._order_numbers)
        self._client.put(f"order/{number}", {"kind": "end"})
        # This process may host the store, so it must not end first.
        self._wait_for_followers(number)

    def _send_order(self, kind: str, task: Task) -> int:
        number = next(self._order_numbers)
        root = task.root.resolve()
        if root not in self._tokens:
            self._tokens[root] = write_marker(root)
        order = {
            "kind": kind,
            "target": task.target.__name__,
            "root": str(root),
            "token": self._tokens[root],
            "settings": dict(task.settings),
            "num_items": task.num_items,
        }
        self._client.put(f"order/{number}", order)
        return number

    def _wait_for_followers(self, number: int) -> None:
        for rank in self._followers:
            self._client.get(f"{number}/counts/{rank}", self._followers)


def _follow(client: StoreClient, targets: Mapping[str, Callable[..., Any]]) -> None:
    """Carry out the leader's orders until it ends the run."""
    for number in count():
        order = client.get(f"order/{number}", [_LEADER])
        counts: Counts = {}
        if order["kind"] != "end":
            task = Task(targets[order["target"]], Path(order["root"]), order["settings"], order["num_items"])
            require_marker(task.root, order["token"], client.name)
            if order["kind"] == "map":
                counts = _run_items(task, number, client, discard_log, lambda: client.check_alive([_LEADER]))
            else:
                with _explain_lost_process(client, [_LEADER]):
                    task.target(task.root, processes=client.size, progress=SilentProgress(), **task.settings)
            free_memory()  # The next order loads other models.
        client.put(f"{number}/counts/{client.rank}", counts)
        if order["kind"] == "end":
            return


def _run_items(
    task: Task, number: int, client: StoreClient, log: Callable[[str], None], after_item: Callable[[], None]
) -> Counts:
    """Claim and run items of order ``number`` until none is left; return this process's counts."""
    counts: Counts = {}

    def claims() -> Iterator[int]:
        while (item := client.add(f"{number}/next", 1) - 1) < task.num_items:
            yield item

    with closing(task.target(task.root, log=log, **task.settings)) as worker:
        for result in results_of(worker, claims()):
            add_counts(counts, result.counts)
            client.add(f"{number}/finished", result.num_finished)
            after_item()
    return counts


@contextmanager
def _explain_lost_process(client: StoreClient, ranks: Sequence[int]) -> Iterator[None]:
    """Name the process that was lost during a collective operation.

    torch raises the same RuntimeError for a broken connection as for many other errors, so the
    heartbeats decide which it was.

    Raises:
        CsrError: Another process failed, or one of ``ranks`` sends no heartbeats.
    """
    try:
        yield
    except RuntimeError as error:
        silent = client.silent_ranks(ranks)
        if silent:
            names = ", ".join(map(str, silent))
            raise CsrError(
                f"rank {names} of {client.size} was lost in training: {reason_of(error)}", _RESUME_HINT
            ) from error
        raise


@contextmanager
def _store_errors() -> Iterator[None]:
    """Convert errors of the store.

    Raises:
        CsrError: The process that hosts the store is gone.
    """
    from torch.distributed import DistError

    try:
        yield
    except DistError:
        raise CsrError("the process that hosts the shared key-value store is gone", _RESUME_HINT) from None
