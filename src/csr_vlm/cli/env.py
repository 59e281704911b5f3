"""Implement ``csr env``."""

from __future__ import annotations

from csr_vlm.cli import console


def env() -> None:
    """Print the versions of the libraries that affect results.

    Example: csr env --json
    """
    from csr_vlm.store.run import versions

    version_of = versions()
    if console.mode.json:
        console.print_json(version_of)
    else:
        console.print_table("", ["package", "version"], [[name, version] for name, version in version_of.items()])
