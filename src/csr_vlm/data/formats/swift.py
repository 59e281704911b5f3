"""Exchange pairs in ms-swift's RLHF format: JSON Lines of messages, images and rejected_response, with its registry.

``swift rlhf --rlhf_type dpo --custom_dataset_info OUT/dataset_info.json --dataset OUT/pairs.jsonl``
reads it. Swift resolves relative image paths in its working directory or in ROOT_IMAGE_DIR. If some responses do not
end, ``--remove_unused_columns false`` makes it read ``add_eos`` and ``rejected_add_eos``, which say so.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from csr_vlm.data.formats import jsonl
from csr_vlm.data.preference import ASSISTANT_ROLES, ExportedPair, Responses, read_registry
from csr_vlm.data.rows import IMAGE_PLACEHOLDER, Row, first_field, message_texts
from csr_vlm.store.files import write_json

EMBEDS_IMAGES = False
ENDS_EVERY_RESPONSE = False
_FILE = "pairs.jsonl"


def write(pairs: Iterable[ExportedPair], out: Path) -> Path:
    """Write pairs.jsonl and add its entry to dataset_info.json; return the former."""
    registry = read_registry(out / "dataset_info.json", [])
    jsonl.write(out / _FILE, map(_to_row, pairs))
    entry = {"dataset_path": _FILE, "tags": ["rlhf", "dpo", "vision"]}
    other_entries = [known for known in registry if known.get("dataset_path") != _FILE]
    write_json(out / "dataset_info.json", [*other_entries, entry])
    return out / _FILE


def responses(row: Row) -> Responses | None:
    """Return a row's two responses; None if the row has another format."""
    rejected = first_field(row, ("rejected_response", "rejected_messages"))
    if isinstance(rejected, list):
        texts = [item for item in rejected if isinstance(item, str)]
        rejected = (texts or message_texts(rejected, *ASSISTANT_ROLES) or [""])[-1]
    if not isinstance(rejected, str):
        return None
    # Releases before 3 have a query and a response, both texts.
    response = row.get("response")
    chosen = message_texts(row.get("messages"), *ASSISTANT_ROLES) or [response if isinstance(response, str) else ""]
    return chosen[-1], rejected


def _to_row(exported: ExportedPair) -> dict[str, Any]:
    pair = exported.pair
    # The same context in both responses adds nothing to DPO's loss.
    row: dict[str, Any] = {
        "id": pair.prompt.prompt_id,
        "messages": [
            {"role": "user", "content": f"{IMAGE_PLACEHOLDER}{pair.prompt.text}"},
            {"role": "assistant", "content": pair.chosen.text},
        ],
        "images": [exported.image],
        "rejected_response": pair.rejected.text,
    }
    if exported.described:
        row |= {"add_eos": pair.chosen.complete, "rejected_add_eos": pair.rejected.complete}
    return row | exported.measured()
