"""LLaVA's JSON: one array of prompts, or of pairs as POVID and CSR release them.

A prompt has id, image, and conversations or (CSR) input; a pair has the preferred dialogue
in conversations and the other in rejected_conversations.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from csr_vlm.data.formats import json_array
from csr_vlm.data.formats.preference import Item, Responses, last_said
from csr_vlm.data.formats.rows import PLACEHOLDER, Row

EMBEDS = False
rows = json_array.rows
count = json_array.count


def write(items: Iterable[Item], out: Path) -> Path:
    json_array.write(out / "pairs.json", map(_row, items))
    return out / "pairs.json"


def responses(row: Row) -> Responses | None:
    """Return the two responses; None where the row is of another format."""
    if not isinstance(row.get("rejected_conversations"), list):
        return None
    return last_said(row.get("conversations"), row["rejected_conversations"])


def _row(item: Item) -> dict[str, Any]:
    prompt, question = item.pair.prompt, {"from": "human", "value": f"{PLACEHOLDER}\n{item.pair.prompt.text}"}
    return {
        "id": prompt.prompt_id,
        "image": item.image,
        "conversations": [question, {"from": "gpt", "value": item.pair.chosen.text}],
        "rejected_conversations": [question, {"from": "gpt", "value": item.pair.rejected.text}],
    }
