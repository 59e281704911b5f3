"""Find the recipes that come with the package, which are named by their file without its suffix."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path


def shipped_recipes() -> dict[str, Path]:
    """Return the shipped recipes by name, sorted."""
    return {path.stem: path for path in sorted(_folder().glob("*.yaml"))}


def shipped_files() -> dict[str, Path]:
    """Return all shipped files by name: recipes, and configurations of accelerate as ``accelerate/NAME``."""
    accelerate = {f"accelerate/{path.stem}": path for path in sorted((_folder() / "accelerate").glob("*.yaml"))}
    return {**shipped_recipes(), **accelerate}


def description_of(recipe: Path) -> str:
    """Return the first sentence of the comment at the top of a recipe, as far as it is on the first line.

    Example:
        >>> description_of(shipped_recipes()["quickstart"])
        'The whole method on the embedded world, on a CPU'
    """
    line = recipe.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
    return re.split(r"[.;](?:\s|$)|(?<=\)): |: pip |:$", line, maxsplit=1)[0]


def _folder() -> Path:
    return Path(str(resources.files("csr_vlm.config"))) / "recipes"
