"""Choose the processes on which a command runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from csr_vlm.cli import console
from csr_vlm.core.errors import CsrError
from csr_vlm.scale.executor import LOCAL, Executor
from csr_vlm.scale.torchrun import num_launched, torchrun_executor

RayActors = Annotated[
    int | None, typer.Option("--ray", min=1, help="Number of Ray actors; training stays in this process.")
]


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
