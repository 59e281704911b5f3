"""RLAIF-V's Parquet: the image's bytes, question, chosen, rejected, and where they come from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from csr_vlm.data.formats import parquet
from csr_vlm.data.formats.preference import Item, Responses
from csr_vlm.data.formats.rows import Row

EMBEDS = True
_TEXTS = ("question", "chosen", "rejected", "origin_dataset", "origin_split", "idx", "image_path")
_COLUMNS = {"ds_name": pa.string(), "image": parquet.IMAGE, **dict.fromkeys(_TEXTS, pa.string())}


def write(items: Iterable[Item], out: Path) -> Path:
    parquet.write(out / "pairs.parquet", map(_row, items), _COLUMNS)
    return out / "pairs.parquet"


def responses(row: Row) -> Responses | None:
    """Return the two responses; None where the row is of another format."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    return (chosen, rejected) if isinstance(chosen, str) and isinstance(rejected, str) else None


def _row(item: Item) -> dict[str, Any]:
    pair = item.pair
    return {
        "ds_name": "csr-vlm",
        # The format has no other place for the image.
        "image": replace(item, embedded=True).encoded_image(),
        "question": pair.prompt.text,
        "chosen": pair.chosen.text,
        "rejected": pair.rejected.text,
        "origin_dataset": "csr-vlm",
        "origin_split": json.dumps({"model": item.origin, "iteration": pair.iteration}),
        "idx": pair.prompt.prompt_id,
        "image_path": item.image,
    }
