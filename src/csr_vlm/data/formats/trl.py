"""Exchange pairs in TRL's vision preference format for DPOTrainer: images, and prompt, chosen, rejected as messages.

Message contents are text; TRL inserts the image before the first. Its trainers drop the extra ``id``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from csr_vlm.data.formats import parquet
from csr_vlm.data.preference import ExportedPair, Responses, last_responses
from csr_vlm.data.rows import Row

EMBEDS_IMAGES = True
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_COLUMNS = {
    "id": pa.string(),
    "images": pa.list_(parquet.IMAGE),
    "prompt": _MESSAGES,
    "chosen": _MESSAGES,
    "rejected": _MESSAGES,
}


def write(pairs: Iterable[ExportedPair], out: Path) -> Path:
    """Write pairs.parquet; return it."""
    parquet.write(out / "pairs.parquet", map(_to_row, pairs), _COLUMNS)
    return out / "pairs.parquet"


def responses(row: Row) -> Responses | None:
    """Return a row's two responses; None if the row has another format."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return chosen, rejected
    # Lists of texts are HA-DPO's.
    are_messages = all(
        isinstance(side, list) and any(isinstance(item, dict) for item in side) for side in (chosen, rejected)
    )
    return last_responses(chosen, rejected) if are_messages else None


def _to_row(exported: ExportedPair) -> dict[str, Any]:
    pair = exported.pair
    return {
        "id": pair.prompt.prompt_id,
        "images": [exported.encoded_image()],
        "prompt": [{"role": "user", "content": pair.prompt.text}],
        "chosen": [{"role": "assistant", "content": pair.chosen.text}],
        "rejected": [{"role": "assistant", "content": pair.rejected.text}],
    }
