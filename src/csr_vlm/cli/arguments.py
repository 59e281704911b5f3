"""How verbs name recipes and runs, and how they come to them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from csr_vlm.config.load import load_config, option_keys
from csr_vlm.config.schema import RunConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.store.run import Run


def _complete_target(incomplete: str) -> list[str]:
    """Offer the recipes and runs that are there."""
    found = [*Path("recipes").glob("*.yaml"), *(path.parent for path in Path("runs").glob("*/config.yaml"))]
    return sorted(str(path) for path in found if str(path).startswith(incomplete))


def complete_run(incomplete: str) -> list[str]:
    return [path for path in _complete_target(incomplete) if not path.endswith(".yaml")]


def _complete_override(incomplete: str) -> list[str]:
    """Offer the keys of the configuration."""
    return [f"{key}=" for key in option_keys() if key.startswith(incomplete)]


Target = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|RUN", autocompletion=_complete_target, help="Recipe (YAML), or the directory of a run."
    ),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", autocompletion=complete_run, help="Directory of a run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", autocompletion=_complete_override, help="Such as method.lambda=0.7."),
]
Out = Annotated[Path | None, typer.Option("--out", help="Run directory; runs/NAME-OF-RECIPE by default.")]
Iteration = Annotated[int | None, typer.Option("--iteration", min=1, help="Which; the next one to do by default.")]


def settings(target: str, overrides: list[str] | None) -> RunConfig:
    """Read the settings of a recipe, or of a run that exists."""
    path = Path(target)
    if path.is_dir():
        return load_config(None, overrides or (), base=Run.open(path).config.dump())
    return load_config(path, overrides or ())


def open_or_create(target: str, overrides: list[str] | None, out: Path | None, *, plan_only: bool = False) -> Run:
    """Open the run that is meant, or start it; to plan only, nothing is written."""
    path = Path(target)
    if path.is_dir():
        if overrides:
            raise CsrError(
                f"{path} is a run: its settings are fixed",
                f"start another with csr run {path}/config.yaml {' '.join(overrides)} --out DIR",
            )
        return Run.open(path)
    start = Run.planned if plan_only else Run.create
    return start(out or Path("runs") / path.stem, settings(target, overrides))
