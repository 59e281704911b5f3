"""Run work items on the machines of a Ray cluster with Ray Data.

The rows of the dataset are the indices of the work items. A pool of actors runs them, each with
the models loaded once. Ray Data restarts an actor that died and gives its item to another.

Ray Data's job checkpointing is not used. A finished item has left its file, named by everything
it depends on, and running it again changes nothing, so the run directory is the only record of
what is done. If the driver crashes, the same command resumes.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from csr_vlm.core.errors import CsrError, reason_of
from csr_vlm.core.installing import install_command
from csr_vlm.core.progress import Progress
from csr_vlm.scale.executor import (
    Counts,
    LocalExecutor,
    Task,
    Worker,
    add_counts,
    discard_log,
    require_marker,
    write_marker,
)

_RESERVED_CPUS = 2
"""CPUs for Ray Data's own tasks; without any, these and the actors would wait for each other."""
_BLOCKS_PER_ACTOR = 64
"""Blocks of rows per actor: enough for the last ones to be short, few enough for a million items."""
_CONNECT_TIMEOUT = 10
"""Seconds."""


@contextmanager
def ray_executor(num_actors: int) -> Iterator[RayExecutor]:
    """Join the cluster that ``RAY_ADDRESS`` names, or start one on this machine until the context ends.

    Raises:
        CsrError: Ray is not installed, or the cluster cannot be reached or has no room for the actors.
    """
    try:
        import ray
    except ImportError:
        raise CsrError("--ray needs Ray", install_command("ray")) from None
    _require_listener(os.environ.get("RAY_ADDRESS", ""))
    options = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": max(os.cpu_count() or 1, num_actors + _RESERVED_CPUS)}
    try:
        ray.init(log_to_driver=False, include_dashboard=False, **options)
    except Exception as error:  # Ray has no narrower class for a cluster that does not start.
        raise CsrError(f"the Ray cluster cannot be reached: {reason_of(error)}", "check RAY_ADDRESS") from None
    try:
        resources = ray.cluster_resources()
        use_gpus = int(resources.get("GPU", 0)) > 0
        available = int(resources.get("GPU" if use_gpus else "CPU", 0)) - (0 if use_gpus else _RESERVED_CPUS)
        if available < num_actors:
            kind = "GPUs" if use_gpus else f"CPUs besides the {_RESERVED_CPUS} reserved for Ray Data"
            raise CsrError(
                f"--ray {num_actors} needs as many {kind}, but the cluster has {available}",
                f"use --ray {max(available, 1)}",
            )
        yield RayExecutor(num_actors, use_gpus=use_gpus)
    finally:
        ray.shutdown()


class RayExecutor(LocalExecutor):
    """Map tasks over the actors of a cluster; run everything else in this process.

    Args:
        num_actors: Number of actors.
        use_gpus: Give each actor one GPU rather than one CPU.
    """

    def __init__(self, num_actors: int, *, use_gpus: bool) -> None:
        self._num_actors = num_actors
        self._use_gpus = use_gpus

    def map(self, task: Task, progress: Progress, log: Callable[[str], None]) -> Counts:
        import ray
        from ray.data import ActorPoolStrategy

        root = task.root.resolve()
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        num_blocks = min(task.num_items, _BLOCKS_PER_ACTOR * self._num_actors)
        items = ray.data.range(task.num_items, override_num_blocks=num_blocks)
        results = items.map(
            Actor,
            fn_constructor_args=(task.target, str(root), write_marker(root), dict(task.settings)),
            compute=ActorPoolStrategy(size=self._num_actors),
            num_cpus=0 if self._use_gpus else 1,
            num_gpus=1 if self._use_gpus else 0,
        )
        counts: Counts = {}
        try:
            for row in results.iter_rows():
                if row["error"]:
                    raise CsrError(row["error"], row["hint"])
                add_counts(counts, json.loads(row["counts"]))
                progress.advance(int(row["num_finished"]))
        except ray.exceptions.RayError as error:
            raise CsrError(f"an actor failed: {reason_of(error)}", "run the same command again to resume") from error
        return counts


class Actor:
    """Run items in a process of the cluster.

    Errors for the user are returned as rows: an exception would reach the driver as the text of a
    traceback if it was raised in the constructor, without its type.
    """

    def __init__(self, target: Callable[..., Worker], root: str, token: str, settings: Mapping[str, Any]) -> None:
        self._error: CsrError | None = None
        try:
            require_marker(Path(root), token, f"the actor on {socket.gethostname()}")
            self._worker = target(Path(root), log=discard_log, **settings)
        except CsrError as error:
            self._error = error

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Run the item ``row["id"]``; after an error, return the error for all further items.

        Returns:
            A row with ``num_finished``, ``counts`` as JSON, ``error`` and ``hint``; the latter two are empty
            on success.
        """
        if self._error is None:
            try:
                result = self._worker.run_item(int(row["id"]))
                return {
                    "num_finished": result.num_finished,
                    "counts": json.dumps(result.counts),
                    "error": "",
                    "hint": "",
                }
            except CsrError as error:
                self._error = error
        return {"num_finished": 0, "counts": "{}", "error": self._error.message, "hint": self._error.hint}


def _require_listener(address: str) -> None:
    """Check that something listens at HOST:PORT, for which Ray itself would wait for minutes.

    Raises:
        CsrError: The connection is refused or times out.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT).close()
    except OSError as error:
        raise CsrError(
            f"the Ray cluster cannot be reached: {address}: {reason_of(error)}", "check RAY_ADDRESS"
        ) from None
