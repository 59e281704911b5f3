"""ms-swift's RLHF format, JSON Lines of messages, images and rejected_response, with its entry.

``swift rlhf --rlhf_type dpo --custom_dataset_info OUT/dataset_info.json --dataset OUT/pairs.jsonl``;
relative image paths are relative to its working directory, or to ROOT_IMAGE_DIR.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from csr_vlm.data.formats import jsonl
from csr_vlm.data.formats.preference import ASSISTANT, Item, Responses, registered
from csr_vlm.data.formats.rows import PLACEHOLDER, Row, said
from csr_vlm.store.files import write_json

EMBEDS = False
_FILE = "pairs.jsonl"


def write(items: Iterable[Item], out: Path) -> Path:
    known = registered(out / "dataset_info.json", [])
    jsonl.write(out / _FILE, map(_row, items))
    entry = {"dataset_path": _FILE, "tags": ["rlhf", "dpo", "vision"]}
    others = [other for other in known if other.get("dataset_path") != _FILE]
    write_json(out / "dataset_info.json", [*others, entry])
    return out / _FILE


def responses(row: Row) -> Responses | None:
    """Return the two responses; None where the row is of another format."""
    rejected = row.get("rejected_response")
    if not isinstance(rejected, str):
        return None
    return (said(row.get("messages"), *ASSISTANT) or [""])[-1], rejected


def _row(item: Item) -> dict[str, Any]:
    pair = item.pair
    return {
        "id": pair.prompt.prompt_id,
        "messages": [
            {"role": "user", "content": f"{PLACEHOLDER}{pair.prompt.text}"},
            {"role": "assistant", "content": pair.chosen.text},
        ],
        "images": [item.image],
        "rejected_response": pair.rejected.text,
    }
