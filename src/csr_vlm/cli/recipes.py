"""Implement ``csr recipes``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from csr_vlm.cli import console
from csr_vlm.config.shipped import description_of, shipped_files
from csr_vlm.core.errors import CsrError, suggestion
from csr_vlm.store import files


def complete_recipe(incomplete: str) -> list[str]:
    """Complete the names of shipped recipes."""
    return [name for name in shipped_files() if name.startswith(incomplete)]


def recipes(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...", autocompletion=complete_recipe, help="Recipes to copy (default: list them)."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the copies.")] = Path(),
) -> None:
    """List the recipes that come with csr, or copy some.

    csr run, check and all other verbs also take the name of a recipe. Copy a recipe to change it.

    Example: csr recipes llava-1.5-7b
    """
    known = shipped_files()
    if not names:
        described = {name: description_of(path) for name, path in known.items()}
        if console.mode.json:
            console.print_json({name: {"path": str(known[name]), "about": about} for name, about in described.items()})
            return
        width = max(map(len, described))
        for name, about in described.items():
            print(f"{name:{width}}  {about}")
        console.log("next: csr run NAME data.prompts=FOLDER, or csr recipes NAME to get a copy to change")
        return
    copies = []
    for name in (name.removesuffix(".yaml") for name in names):
        if name not in known:
            raise CsrError(f"{name} is not a shipped recipe", suggestion(name, known))
        copies.append((out / f"{name}.yaml", known[name].read_text(encoding="utf-8")))
    for path, text in copies:
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
            raise CsrError(f"{path} exists and has another content", "choose another folder with --out")
    for path, text in copies:
        files.write_text(path, text)
    console.done(*(path for path, _ in copies), then=f"edit it, then csr check {copies[0][0]}")
