"""Exchange pairs in RLAIF-V's Parquet format: image bytes, question, chosen, rejected and their origin."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from csr_vlm.data.formats import parquet
from csr_vlm.data.preference import ExportedPair, Responses
from csr_vlm.data.rows import Row

EMBEDS_IMAGES = True
_TEXT_COLUMNS = ("question", "chosen", "rejected", "origin_dataset", "origin_split", "idx", "image_path")
_COLUMNS = {"ds_name": pa.string(), "image": parquet.IMAGE, **dict.fromkeys(_TEXT_COLUMNS, pa.string())}


def write(pairs: Iterable[ExportedPair], out: Path) -> Path:
    """Write pairs.parquet; return it."""
    parquet.write(out / "pairs.parquet", map(_to_row, pairs), _COLUMNS)
    return out / "pairs.parquet"


def responses(row: Row) -> Responses | None:
    """Return a row's two responses; None if the row has another format."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    return (chosen, rejected) if isinstance(chosen, str) and isinstance(rejected, str) else None


def _to_row(exported: ExportedPair) -> dict[str, Any]:
    pair = exported.pair
    return {
        "ds_name": "csr-vlm",
        # The format cannot refer to an image outside the file.
        "image": replace(exported, embedded=True).encoded_image(),
        "question": pair.prompt.text,
        "chosen": pair.chosen.text,
        "rejected": pair.rejected.text,
        "origin_dataset": "csr-vlm",
        "origin_split": json.dumps({"model": exported.origin, "iteration": pair.iteration}),
        "idx": pair.prompt.prompt_id,
        "image_path": exported.image,
    }
