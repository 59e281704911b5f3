"""Hooks of MkDocs: leave pages that this checkout lacks out of the menu, and rank reference pages first in search."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Drop entries of the menu without a file; MkDocs' strict mode still refuses files without an entry."""
    config.nav = [entry for entry in (_present(entry, Path(config.docs_dir)) for entry in config.nav) if entry]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rank the references above prose that mentions a setting or a command; their length alone would rank them last."""
    if page.file.src_uri in ("configuration.md", "commands.md"):
        page.meta["search"] = {"boost": 8}
    return markdown


def _present(entry: Any, docs: Path) -> Any:
    if isinstance(entry, str):
        return entry if (docs / entry).is_file() else None
    if isinstance(entry, list):
        return [kept for kept in (_present(inner, docs) for inner in entry) if kept]
    ((title, inner),) = entry.items()
    kept = _present(inner, docs)
    return {title: kept} if kept else None
