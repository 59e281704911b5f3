"""Start the processes of ``csr run --gpus N``, with the launcher of torchrun in this process.

The processes find each other as under torchrun (:mod:`csr_vlm.scale.torchrun`), and print and exit as they do there.
This process waits for them. It passes a signal on to all: the leader finishes its work item and says how to resume.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from csr_vlm.core.errors import CsrError

_SECONDS_TO_STOP = 40
"""Time for the processes to end after a signal: the current work item, 20 s at most, and what follows it."""


def launch(num_processes: int, arguments: Sequence[str]) -> int:
    """Run Python in several processes until all have ended; return the exit code.

    Args:
        num_processes: Number of processes; each uses the GPU of its number, if there are GPUs.
        arguments: Arguments of the interpreter.

    Raises:
        CsrError: A process was killed. One that failed has said so itself, and its exit code is returned.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # As many threads for all processes together as there are cores, as torch itself would use in one.
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // num_processes, 1)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=_SECONDS_TO_STOP,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode > 0:
            return int(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        raise CsrError(
            f"process {rank} of {num_processes} was killed by {name}",
            "run the same command again to resume; the system kills processes when memory runs out",
        ) from None
    return 0
