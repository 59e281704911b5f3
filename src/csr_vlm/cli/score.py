"""Implement ``csr score``."""

from __future__ import annotations

from typing import Annotated

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import GeneratedIteration, RunArgument, last_generated
from csr_vlm.cli.executors import RayActors, executor_for
from csr_vlm.cli.signals import stoppable
from csr_vlm.config.load import scorer_config
from csr_vlm.store.run import Run


def score(
    target: RunArgument,
    scorer: Annotated[str, typer.Option(help="Scorer to add: a directory or hub id, as in scorer.path.")],
    name: Annotated[str, typer.Option(help="Name of the scorer in the ledger.")],
    iteration: GeneratedIteration = None,
    trust_import: Annotated[
        bool, typer.Option("--trust-import", help="Allow python:MODULE:CLASS to import and run that class.")
    ] = False,
    ray: RayActors = None,
) -> None:
    """Add another scorer's cosines to an existing ledger.

    Example: csr score runs/q --scorer ./siglip --name siglip
    """
    config = scorer_config(path=scorer, name=name, trust_import=trust_import)
    with executor_for(ray) as executor:
        from csr_vlm.pipeline import stages

        run = Run.open(target)
        number = iteration or last_generated(run)
        with stoppable(console.reporter(), run.root) as reporter, run.locked():
            stages.score(run, number, config, reporter, executor)
    console.log(f"scored iteration {number} with {name}")
    console.done(then=f"csr pairs {target} scorer.use={name}", run=str(target), iteration=number, scorer=name)
