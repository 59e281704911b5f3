"""Exchange pairs in RLAIF-V's Parquet format: image bytes, question, chosen, rejected and their origin."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from csr_vlm.data.formats import parquet
from csr_vlm.data.preference import CONTINUED, MEASURED, ExportedPair, Responses, describes_pairs
from csr_vlm.data.rows import Row


def _renamed(name: str) -> str:
    """Return the column of a field; the question of the format may ask for a sentence, so the prompt's own is text."""
    return "text" if name == "question" else name


EMBEDS_IMAGES = True
EMBEDS_ALWAYS = True
"""The format cannot refer to an image outside the file."""
ENDS_EVERY_RESPONSE = True
_TEXT_COLUMNS = ("question", "chosen", "rejected", "origin_dataset", "origin_split", "idx", "image_path")
_COLUMNS = {
    "ds_name": pa.string(),
    "image": parquet.IMAGE,
    **dict.fromkeys(_TEXT_COLUMNS, pa.string()),
    **MEASURED,
}
_DESCRIBED = {**_COLUMNS, **{_renamed(name): kind for name, kind in CONTINUED.items()}}


def write(pairs: Iterable[ExportedPair], out: Path) -> Path:
    """Write pairs.parquet; return it."""
    described, pairs = describes_pairs(pairs)
    parquet.write(out / "pairs.parquet", map(_to_row, pairs), _DESCRIBED if described else _COLUMNS)
    return out / "pairs.parquet"


def responses(row: Row) -> Responses | None:
    """Return a row's two responses; None if the row has another format."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    return (chosen, rejected) if isinstance(chosen, str) and isinstance(rejected, str) else None


def _to_row(exported: ExportedPair) -> dict[str, Any]:
    pair = exported.pair
    prompt, chosen, rejected = exported.in_turns()
    return {
        **{_renamed(name): value for name, value in exported.measured().items()},
        "ds_name": "csr-vlm",
        "image": exported.encoded_image(),
        "question": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "origin_dataset": "csr-vlm",
        "origin_split": json.dumps({"model": exported.origin, "iteration": pair.iteration}),
        "idx": pair.prompt.prompt_id,
        "image_path": exported.image,
    }
