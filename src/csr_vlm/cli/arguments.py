"""Define the arguments that several verbs share, and open the recipe or run that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from csr_vlm.config.load import load_config, option_keys, recipe_name
from csr_vlm.config.schema import RunConfig
from csr_vlm.config.shipped import shipped_recipes
from csr_vlm.core.errors import CsrError
from csr_vlm.store.run import Run


def _complete_target(incomplete: str) -> list[str]:
    """Complete the paths of recipes and runs in the current directory."""
    paths = [*Path("recipes").glob("*.yaml"), *(path.parent for path in Path("runs").glob("*/config.yaml"))]
    names = [*map(str, paths), *shipped_recipes()]
    return sorted(name for name in names if name.startswith(incomplete))


def complete_run(incomplete: str) -> list[str]:
    """Complete the paths of runs in the current directory."""
    runs = (str(path.parent) for path in Path("runs").glob("*/config.yaml"))
    return sorted(run for run in runs if run.startswith(incomplete))


def _complete_override(incomplete: str) -> list[str]:
    """Complete the keys of the configuration."""
    return [f"{key}=" for key in option_keys() if key.startswith(incomplete)]


Target = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|RUN",
        autocompletion=_complete_target,
        help="Recipe (YAML file, or a name that csr recipes lists) or run directory.",
    ),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", autocompletion=complete_run, help="Run directory.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", autocompletion=_complete_override, help="Settings, such as method.lambda=0.7."),
]
Out = Annotated[Path | None, typer.Option("--out", help="Run directory (default: runs/NAME-OF-RECIPE).")]
BaseModel = Annotated[
    str | None,
    typer.Option("--base-model", metavar="ID", help="Hub id of the base model, if the run has it as a folder."),
]
NextIteration = Annotated[int | None, typer.Option("--iteration", min=1, help="Iteration (default: next unfinished).")]
GeneratedIteration = Annotated[
    int | None, typer.Option("--iteration", min=1, help="Iteration (default: last generated).")
]


def last_generated(run: Run) -> int:
    """Return the last iteration with a finished ledger; 1 if there is none."""
    return max(run.iterations_done("generate"), default=1)


def read_settings(target: str, overrides: list[str] | None) -> RunConfig:
    """Load the settings of a recipe or of an existing run, and apply overrides."""
    path = Path(target)
    if path.is_dir():
        return load_config(None, overrides or (), base=Run.open(path).config.dump())
    return load_config(path, overrides or ())


def default_out(recipe: str) -> Path:
    """Return the run directory of a recipe without ``--out``."""
    return Path("runs") / recipe_name(Path(recipe))


def open_or_create(target: str, overrides: list[str] | None, out: Path | None, *, dry_run: bool = False) -> Run:
    """Open an existing run, or start one from a recipe; a dry run writes nothing.

    Raises:
        CsrError: The target is an existing run and overrides are given.
    """
    path = Path(target)
    if path.is_dir():
        if overrides:
            raise CsrError(
                f"{path} is an existing run, and its settings are fixed",
                f"start another with csr run {path}/config.yaml {' '.join(overrides)} --out DIR",
            )
        return Run.open(path)
    config, root = read_settings(target, overrides), out or default_out(target)
    if dry_run:
        return Run.planned(root, config)
    from csr_vlm.pipeline.start import require_sources

    require_sources(config)
    return Run.create(root, config)
