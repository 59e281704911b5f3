"""Work items over the machines of a Ray cluster, by Ray Data.

The rows of the data set are the numbers of the work items; a pool of actors, each with the
models loaded once, does them. Ray Data starts an actor that died again and gives its item
to another. Its job checkpointing is not used: an item that is done has left its file, named
by what it depends on, and doing it again changes nothing, so the run directory already
says what is done, and there is no second record that could say otherwise. A driver that
crashed is started again by the same command.
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
from csr_vlm.core.progress import Progress
from csr_vlm.scale.executor import LocalExecutor, Tally, Task, Worker, add_counts, require_marker, write_marker

_CPUS_BESIDE = 2
"""Ray Data's own tasks need room beside the actors; without any the two wait for each other."""
_BLOCKS_AN_ACTOR = 64
"""Rows are handed out in blocks: enough of them that the last ones are small, few enough that a million items do."""


def _require_somebody_there(address: str) -> None:
    """Ask whether anything listens at HOST:PORT, for which Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise CsrError(
            f"the Ray cluster cannot be reached: {address}: {reason_of(error)}", "check RAY_ADDRESS"
        ) from None


@contextmanager
def ray_executor(actors: int) -> Iterator[RayActors]:
    """Join the cluster that ``RAY_ADDRESS`` names, or start one on this machine for as long as this lasts.

    Raises:
        CsrError: Ray is not installed, or the cluster has no room for so many actors.
    """
    try:
        import ray
    except ImportError:
        raise CsrError("--ray needs Ray", "pip install 'csr-vlm[ray]'") from None
    _require_somebody_there(os.environ.get("RAY_ADDRESS", ""))
    here = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": max(os.cpu_count() or 1, actors + _CPUS_BESIDE)}
    try:
        ray.init(log_to_driver=False, include_dashboard=False, **here)
    except Exception as error:  # Ray has no narrower class for a cluster that does not come up
        raise CsrError(f"the Ray cluster cannot be reached: {_first_line(error)}", "check RAY_ADDRESS") from None
    try:
        found = ray.cluster_resources()
        gpus = int(found.get("GPU", 0)) > 0
        have = int(found.get("GPU" if gpus else "CPU", 0)) - (0 if gpus else _CPUS_BESIDE)
        if have < actors:
            kind = "GPUs" if gpus else "processors that Ray Data leaves free"
            raise CsrError(
                f"{actors} actors were asked for, but the cluster has {have} {kind}", f"--ray {max(have, 1)}"
            )
        yield RayActors(actors, gpus=gpus)
    finally:
        ray.shutdown()


class RayActors(LocalExecutor):
    """Actors of a cluster spread the work; what is done together is done in this process.

    Args:
        number: Of actors.
        gpus: Whether each has a GPU of its own.
    """

    def __init__(self, number: int, *, gpus: bool) -> None:
        self._number = number
        self._gpus = gpus

    def map(self, task: Task, progress: Progress, log: Callable[[str], None]) -> Tally:
        import ray
        from ray.data import ActorPoolStrategy

        root = task.root.resolve()
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        num_blocks = min(task.num_items, _BLOCKS_AN_ACTOR * self._number)
        items = ray.data.range(task.num_items, override_num_blocks=num_blocks)
        done = items.map(
            _Actor,
            fn_constructor_args=(task.make, str(root), write_marker(root), dict(task.settings)),
            compute=ActorPoolStrategy(size=self._number),
            num_cpus=0 if self._gpus else 1,
            num_gpus=1 if self._gpus else 0,
        )
        tally: Tally = {}
        try:
            for row in done.iter_rows():
                add_counts(tally, json.loads(row["tally"]))
                progress.advance(int(row["amount"]))
        except ray.exceptions.RayError as error:
            raise _in_our_words(error) from error
        return tally


class _Actor:
    """Does items in a process of its own, somewhere in the cluster."""

    def __init__(self, make: Callable[..., Worker], root: str, mark: str, settings: Mapping[str, Any]) -> None:
        require_marker(Path(root), mark, f"the actor on {socket.gethostname()}")
        self._work = make(Path(root), log=_discard, **settings)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        done = self._work.run_item(int(row["id"]))
        return {"amount": done.amount, "tally": json.dumps(done.tally)}


def _in_our_words(error: Exception) -> CsrError:
    """Find what a user can mend in what Ray says about an actor."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, CsrError):
            return CsrError(cause.message, cause.hint)
        cause = getattr(cause, "cause", None) or cause.__cause__
    # An actor that could not even start leaves only its traceback, as text.
    said = [line.partition("CsrError: ")[2] for line in str(error).splitlines() if "CsrError: " in line]
    return CsrError(
        f"an actor failed: {said[-1] if said else _first_line(error)}", "the same command goes on from here"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _discard(text: str) -> None:
    pass
