"""Read SENTINEL's pairs: two sentences, ``y_win`` and ``y_lose``, that continue the same ``context``."""

from __future__ import annotations

from csr_vlm.data.preference import Responses
from csr_vlm.data.rows import Row


def responses(row: Row) -> Responses | None:
    """Return the context with each of its two continuations; None if the row has another format."""
    chosen, rejected, context = row.get("y_win"), row.get("y_lose"), row.get("context") or ""
    if not isinstance(chosen, str) or not isinstance(rejected, str) or not isinstance(context, str):
        return None
    return context + chosen, context + rejected
