"""Exchange pairs in TRL's vision preference format for DPOTrainer: images, and prompt, chosen, rejected.

These are messages, whose contents are text; TRL inserts the image before the first, and ends every response. If some
responses do not end, they are texts in the policy's chat template, which TRL takes as they are. Its trainers drop all
other columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from csr_vlm.data.formats import parquet
from csr_vlm.data.preference import (
    CONTINUED,
    MEASURED,
    ExportedPair,
    Responses,
    describes_pairs,
    last_responses,
)
from csr_vlm.data.rows import Row

EMBEDS_IMAGES = True
ENDS_EVERY_RESPONSE = False
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_COLUMNS = {
    "id": pa.string(),
    "images": pa.list_(parquet.IMAGE),
    "prompt": _MESSAGES,
    "chosen": _MESSAGES,
    "rejected": _MESSAGES,
    **MEASURED,
}
_DESCRIBED = {**_COLUMNS, **dict.fromkeys(("prompt", "chosen", "rejected"), pa.string()), **CONTINUED}


def write(pairs: Iterable[ExportedPair], out: Path) -> Path:
    """Write pairs.parquet; return it."""
    described, pairs = describes_pairs(pairs)
    parquet.write(out / "pairs.parquet", map(_to_row, pairs), _DESCRIBED if described else _COLUMNS)
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
    pair, formatted = exported.pair, exported.formatted
    if formatted is not None:
        texts: dict[str, Any] = vars(formatted)
    else:
        texts = {
            "prompt": [{"role": "user", "content": pair.prompt.text}],
            "chosen": [{"role": "assistant", "content": pair.chosen.text}],
            "rejected": [{"role": "assistant", "content": pair.rejected.text}],
        }
    return {"id": pair.prompt.prompt_id, "images": [exported.encoded_image()], **texts, **exported.measured()}
