"""Which processes a command works with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from csr_vlm.cli import console
from csr_vlm.core.errors import CsrError
from csr_vlm.scale.executor import ALONE, Crew
from csr_vlm.scale.torchrun import launched, num_launched

RayActors = Annotated[
    int | None, typer.Option("--ray", min=1, help="Generate, ask or score in so many Ray actors; train here.")
]


@contextmanager
def crew_of(ray_actors: int | None = None) -> Iterator[Crew | None]:
    """Give a command its crew: this process, those that a launcher started beside it, or Ray actors.

    Yields None in a launched process that is not the first, once all its work is done.
    """
    console.quiet_libraries()
    if num_launched() > 1:
        if ray_actors is not None:
            raise CsrError("a launcher and --ray both spread the work", "use one of the two")
        from csr_vlm.pipeline.tasks import SHARED

        with launched(SHARED) as ranks:
            yield ranks
    elif ray_actors is not None:
        from csr_vlm.scale.ray import ray_crew

        with ray_crew(ray_actors) as crew:
            yield crew
    else:
        yield ALONE
