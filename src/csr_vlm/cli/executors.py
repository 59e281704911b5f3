"""Choose the processes on which a command runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from csr_vlm.cli import console
from csr_vlm.core.errors import CsrError
from csr_vlm.models.devices import count_gpus
from csr_vlm.scale.executor import LOCAL, Executor
from csr_vlm.scale.torchrun import num_launched, torchrun_executor

RayActors = Annotated[
    int | None, typer.Option("--ray", min=1, help="Number of Ray actors; training stays in this process.")
]


Gpus = Annotated[
    str | None,
    typer.Option(
        "--gpus",
        metavar="N|auto",
        help="GPUs of this machine to use, a process for each; auto: all. With model.device=cpu: number of processes.",
    ),
]


def num_processes(gpus: str | None, device: str) -> int:
    """Return the number of processes to start for ``--gpus``; 1 if a launcher has started this one.

    Args:
        gpus: Value of the option.
        device: The setting ``model.device``.

    Raises:
        CsrError: It is not a number, or there are not so many GPUs.
    """
    if gpus is None or num_launched() > 1:
        return 1
    if gpus != "auto" and not re.fullmatch("[1-9][0-9]{0,3}", gpus):
        raise CsrError(f"--gpus {gpus!r} is not a number of GPUs", "write --gpus 8, or --gpus auto")
    if device == "cpu":
        return 1 if gpus == "auto" else int(gpus)
    available = count_gpus()
    number = max(available, 1) if gpus == "auto" else int(gpus)
    if number > max(available, 1):
        raise CsrError(
            f"--gpus {number}, but torch sees {available}",
            f"use --gpus {available}" if available else "set model.device=cpu to use so many processes on the CPU",
        )
    if number > 1 and device not in ("auto", "cuda"):
        raise CsrError(f"--gpus {number} cannot be combined with model.device={device}", "set model.device=auto")
    return number


@contextmanager
def executor_for(ray_actors: int | None = None) -> Iterator[Executor]:
    """Yield the executor of a command: this process, the processes of a launcher, or Ray actors.

    A launched process other than rank 0 gets no executor: it works for the leader and ends with it.
    """
    console.quiet_libraries()
    if num_launched() > 1:
        if ray_actors is not None:
            raise CsrError(
                "--ray cannot be combined with torchrun or accelerate launch", "use either --ray or a launcher"
            )
        from csr_vlm.pipeline.tasks import WORKERS

        with torchrun_executor(WORKERS) as executor:
            yield executor
    elif ray_actors is not None:
        from csr_vlm.scale.ray import ray_executor

        with ray_executor(ray_actors) as executor:
            yield executor
    else:
        yield LOCAL
