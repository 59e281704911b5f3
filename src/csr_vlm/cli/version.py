"""Implement ``csr version`` and ``csr --version``."""

from __future__ import annotations

from importlib import metadata

import typer

from csr_vlm.cli import console


def version() -> None:
    """Print the version of csr-vlm.

    Example: csr version
    """
    number = metadata.version("csr-vlm")
    if console.mode.json:
        console.print_json({"version": number})
    else:
        print(f"csr-vlm {number}")


def print_version_and_exit(requested: bool) -> None:
    """Handle ``--version`` before any verb runs."""
    if requested:
        version()
        raise typer.Exit
