"""TRL's vision preference format, for DPOTrainer: images, prompt, chosen, rejected as messages.

The messages are plain text; TRL itself puts the image before the first. The extra ``id`` is
dropped by its trainers.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from csr_vlm.data.formats import parquet
from csr_vlm.data.formats.preference import Item, Responses, last_said
from csr_vlm.data.formats.rows import Row

EMBEDS = True
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_COLUMNS = {
    "id": pa.string(),
    "images": pa.list_(parquet.IMAGE),
    "prompt": _MESSAGES,
    "chosen": _MESSAGES,
    "rejected": _MESSAGES,
}


def write(items: Iterable[Item], out: Path) -> Path:
    parquet.write(out / "pairs.parquet", map(_row, items), _COLUMNS)
    return out / "pairs.parquet"


def responses(row: Row) -> Responses | None:
    """Return the two responses; None where the row is of another format."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    return last_said(chosen, rejected) if isinstance(chosen, list) and isinstance(rejected, list) else None


def _row(item: Item) -> dict[str, Any]:
    prompt = item.pair.prompt
    return {
        "id": prompt.prompt_id,
        "images": [item.encoded_image()],
        "prompt": [{"role": "user", "content": prompt.text}],
        "chosen": [{"role": "assistant", "content": item.pair.chosen.text}],
        "rejected": [{"role": "assistant", "content": item.pair.rejected.text}],
    }
