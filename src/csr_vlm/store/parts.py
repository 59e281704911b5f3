"""The files of a ledger: a part for each work item, or one for several that were packed into it.

part-000007-2f7c09d1a3b4c5d6.parquet    work item 7; the hash is of all that its content depends on
part-000000-to-000079.parquet           work items 0 to 79
"""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"part-(\d+)(?:-to-(\d+))?\b.*\.parquet")


def part_name(item: int, digest: str) -> str:
    return f"part-{item:06d}-{digest}.parquet"


def packed_name(items: range) -> str:
    return f"part-{items[0]:06d}-to-{items[-1]:06d}.parquet"


def items_of(part: Path) -> range:
    """Which work items a part holds, by its name."""
    found = _NAME.fullmatch(part.name)
    assert found is not None
    first, last = found.groups()
    return range(int(first), int(last or first) + 1)


def existing(directory: Path) -> tuple[list[Path], list[Path]]:
    """List the parts that make up a ledger, in order, and those that were packed into one of them."""
    named = ((items_of(path), path) for path in directory.glob("part-*.parquet") if _NAME.fullmatch(path.name))
    parts: list[Path] = []
    packed: list[Path] = []
    last = range(0)
    for items, path in sorted(named, key=lambda entry: (entry[0].start, -len(entry[0]), entry[1].name)):
        if len(last) > len(items) and items.stop <= last.stop:
            packed.append(path)
        else:
            parts.append(path)
            last = items
    return parts, packed
