"""Hook of MkDocs: the menu leaves out pages that this checkout does not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Drop entries of the menu without a file; MkDocs' strict mode still refuses files without an entry."""
    config.nav = [entry for entry in (_present(entry, Path(config.docs_dir)) for entry in config.nav) if entry]
    return config


def _present(entry: Any, docs: Path) -> Any:
    if isinstance(entry, str):
        return entry if (docs / entry).is_file() else None
    if isinstance(entry, list):
        return [kept for kept in (_present(inner, docs) for inner in entry) if kept]
    ((title, inner),) = entry.items()
    kept = _present(inner, docs)
    return {title: kept} if kept else None
