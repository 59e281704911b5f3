"""Exchange pairs in SENTINEL's form: two sentences, ``y_win`` and ``y_lose``, that continue the same ``context``.

``chosen_ends`` and ``rejected_ends``, which SENTINEL does not have, say whether the response ends with its sentence.
Exports in other formats have these fields too if they hold pairs that do not end.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from csr_vlm.data import json_array
from csr_vlm.data.preference import ExportedPair, Responses
from csr_vlm.data.rows import Row

EMBEDS_IMAGES = False
ENDS_EVERY_RESPONSE = False


def write(pairs: Iterable[ExportedPair], out: Path) -> Path:
    """Write pairs.json; return it."""
    json_array.write(out / "pairs.json", map(_to_row, pairs))
    return out / "pairs.json"


def responses(row: Row) -> Responses | None:
    """Return the context with each of its two continuations; None if the row has another format."""
    chosen, rejected, context = row.get("y_win"), row.get("y_lose"), row.get("context") or ""
    if not isinstance(chosen, str) or not isinstance(rejected, str) or not isinstance(context, str):
        return None
    return context + chosen, context + rejected


def ends(row: Row) -> tuple[bool, bool]:
    """Return whether the chosen and the rejected response end; SENTINEL's own do not."""
    if responses(row) is None:
        return True, True
    return bool(row.get("chosen_ends")), bool(row.get("rejected_ends"))


def _to_row(exported: ExportedPair) -> dict[str, Any]:
    values = exported.measured() if exported.described else {**exported.continued(), **exported.measured()}
    return {"image_id": exported.pair.prompt.prompt_id, "image_path": exported.image, **values}
