"""Exchange pairs in LLaMA-Factory's ranking format (sharegpt with images) and register them in dataset_info.json.

LLaMA-Factory resolves relative image paths in ``media_dir``, by default the folder of dataset_info.json.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from csr_vlm.data import json_array
from csr_vlm.data.preference import ExportedPair, Responses, last_responses, read_registry
from csr_vlm.data.rows import IMAGE_PLACEHOLDER, Row
from csr_vlm.store.files import write_json

EMBEDS_IMAGES = False
ENDS_EVERY_RESPONSE = True
DATASET = "csr_pairs"
"""Name of the dataset for LLaMA-Factory's ``dataset:`` option."""
_FILE = "pairs.json"


def write(pairs: Iterable[ExportedPair], out: Path) -> Path:
    """Write pairs.json and add its entry to dataset_info.json; return the former."""
    registry = read_registry(out / "dataset_info.json", {})
    json_array.write(out / _FILE, map(_to_row, pairs))
    entry = {
        "file_name": _FILE,
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"},
    }
    write_json(out / "dataset_info.json", {**registry, DATASET: entry})
    return out / _FILE


def responses(row: Row) -> Responses | None:
    """Return a row's two responses; None if the row has another format."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, dict) and isinstance(rejected, dict):
        return last_responses(chosen, rejected)
    # The alpaca form has texts.
    return (
        (chosen, rejected) if "instruction" in row and isinstance(chosen, str) and isinstance(rejected, str) else None
    )


def _to_row(exported: ExportedPair) -> dict[str, Any]:
    prompt, chosen, rejected = exported.in_turns()
    return {
        "id": exported.pair.prompt.prompt_id,
        "conversations": [{"from": "human", "value": f"{IMAGE_PLACEHOLDER}{prompt}"}],
        "chosen": {"from": "gpt", "value": chosen},
        "rejected": {"from": "gpt", "value": rejected},
        "images": [exported.image],
        **exported.measured(),
    }
