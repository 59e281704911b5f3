"""Read HA-DPO's pairs, whose images are Visual Genome's.

Descriptions are one object that maps image ids to ``{"chosen": [...], "rejected": [...]}``, or a list of such objects
with an ``image_id``; they have no question. Questions of the POPE kind have ``question``, ``chosen`` and ``reject``.
"""

from __future__ import annotations

from collections.abc import Callable

from csr_vlm.data.preference import Responses
from csr_vlm.data.rows import Row, is_present, row_image, row_text

QUESTION = "Describe this image in detail."
"""Question of the descriptions."""
_FOLDERS = ("VG_100K", "VG_100K_2")
"""Folders of Visual Genome below the image root."""


def responses(row: Row) -> Responses | None:
    """Return a row's two responses, the first of each list; None if the row has another format."""
    chosen, rejected = row.get("chosen"), row.get("rejected", row.get("reject"))
    if isinstance(chosen, str) and isinstance(row.get("reject"), str):
        return chosen, row["reject"]
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        return None
    sides = [next((text for text in side if isinstance(text, str)), None) for side in (chosen, rejected)]
    return None if sides[0] is None or sides[1] is None else (sides[0], sides[1])


def completed(row: Row, is_file: Callable[[str], bool]) -> Row:
    """Add what the format leaves out: the question of a description, and the path of the image.

    Args:
        row: Row of any format.
        is_file: Returns whether a path below the image root is a file.
    """
    if responses(row) is None or not is_present(row.get("image_id")):
        return row
    names = [f"{row['image_id']}.jpg", *(f"{folder}/{row['image_id']}.jpg" for folder in _FOLDERS)]
    image = next((name for name in names if is_file(name)), names[0])
    added = {} if row_text(row) else {"question": QUESTION}
    return {**row, **added} if row_image(row) is not None else {**row, **added, "image": image}
