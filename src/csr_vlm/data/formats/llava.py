"""Read LLaVA's JSON, one array of prompts, and exchange pairs in the form in which POVID and CSR release them.

A prompt has ``id``, ``image``, and ``conversations`` or (CSR) ``input``. A pair has the chosen
dialogue in ``conversations`` and the rejected one in ``rejected_conversations``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from csr_vlm.data import json_array
from csr_vlm.data.preference import ExportedPair, Responses, last_responses
from csr_vlm.data.rows import IMAGE_PLACEHOLDER, Row

EMBEDS_IMAGES = False
ENDS_EVERY_RESPONSE = True
rows = json_array.rows
count = json_array.count


def write(pairs: Iterable[ExportedPair], out: Path) -> Path:
    """Write pairs.json; return it."""
    json_array.write(out / "pairs.json", map(_to_row, pairs))
    return out / "pairs.json"


def responses(row: Row) -> Responses | None:
    """Return a row's two responses; None if the row has another format."""
    if not isinstance(row.get("rejected_conversations"), list):
        return None
    return last_responses(row.get("conversations"), row["rejected_conversations"])


def _to_row(exported: ExportedPair) -> dict[str, Any]:
    prompt, chosen, rejected = exported.in_turns()
    question = {"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n{prompt}"}
    return {
        "id": exported.pair.prompt.prompt_id,
        "image": exported.image,
        "conversations": [question, {"from": "gpt", "value": chosen}],
        "rejected_conversations": [question, {"from": "gpt", "value": rejected}],
        **exported.measured(),
    }
