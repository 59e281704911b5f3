"""Name the files of a ledger: one part per work item, or one packed file for several of them.

part-000007-2f7c09d1a3b4c5d6.parquet    work item 7; the digest covers everything its content depends on
part-000000-to-000079.parquet           work items 0 to 79
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from csr_vlm.core.errors import CsrError

_LISTED_WITHIN = 30.0
"""Seconds until a file that one machine wrote is listed on all others of a network file system."""
_NAME = re.compile(r"part-(\d+)(?:-to-(\d+))?\b.*\.parquet")


def part_name(item: int, digest: str) -> str:
    """Return the file name of the part of one work item."""
    return f"part-{item:06d}-{digest}.parquet"


def packed_name(items: range) -> str:
    """Return the file name of the packed parts of consecutive work items."""
    return f"part-{items[0]:06d}-to-{items[-1]:06d}.parquet"


def items_of(part: Path) -> range:
    """Return the work items that a part holds, according to its name."""
    match = _NAME.fullmatch(part.name)
    assert match is not None
    first, last = match.groups()
    return range(int(first), int(last or first) + 1)


def list_parts(directory: Path) -> tuple[list[Path], list[Path]]:
    """Return the parts that make up a ledger, in order, and the obsolete parts that were packed into one of them."""
    named = ((items_of(path), path) for path in directory.glob("part-*.parquet") if _NAME.fullmatch(path.name))
    parts: list[Path] = []
    obsolete: list[Path] = []
    last = range(0)
    for items, path in sorted(named, key=lambda entry: (entry[0].start, -len(entry[0]), entry[1].name)):
        if len(last) > len(items) and items.stop <= last.stop:
            obsolete.append(path)
        else:
            parts.append(path)
            last = items
    return parts, obsolete


def wait_for_parts(directory: Path, num_items: int, timeout: float = _LISTED_WITHIN) -> list[Path]:
    """Return the parts of all work items, which were written; a network file system may list those of others late.

    Raises:
        CsrError: Some are not listed after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        found, _ = list_parts(directory)
        missing = num_items - len({item for part in found for item in items_of(part)})
        if missing <= 0:
            return found
        if time.monotonic() > deadline:
            raise CsrError(
                f"{directory} lists {num_items - missing} of {num_items} parts that were written",
                "the file system shows files of other machines late, or lost them; run the same command again",
            )
        time.sleep(0.2)
