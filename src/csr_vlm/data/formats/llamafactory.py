"""LLaMA-Factory's ranking format (sharegpt with images), with its entry in dataset_info.json.

Its ``media_dir`` is the folder of dataset_info.json by default, so relative image paths work.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from csr_vlm.data.formats import json_array
from csr_vlm.data.formats.preference import Item, Responses, last_said, registered
from csr_vlm.data.formats.rows import PLACEHOLDER, Row
from csr_vlm.store.files import write_json

EMBEDS = False
DATASET = "csr_pairs"
"""What LLaMA-Factory's ``dataset:`` option names it by."""
_FILE = "pairs.json"


def write(items: Iterable[Item], out: Path) -> Path:
    known = registered(out / "dataset_info.json", {})
    json_array.write(out / _FILE, map(_row, items))
    entry = {
        "file_name": _FILE,
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"},
    }
    write_json(out / "dataset_info.json", {**known, DATASET: entry})
    return out / _FILE


def responses(row: Row) -> Responses | None:
    """Return the two responses; None where the row is of another format."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    return last_said(chosen, rejected) if isinstance(chosen, dict) and isinstance(rejected, dict) else None


def _row(item: Item) -> dict[str, Any]:
    prompt = item.pair.prompt
    return {
        "id": prompt.prompt_id,
        "conversations": [{"from": "human", "value": f"{PLACEHOLDER}{prompt.text}"}],
        "chosen": {"from": "gpt", "value": item.pair.chosen.text},
        "rejected": {"from": "gpt", "value": item.pair.rejected.text},
        "images": [item.image],
    }
