"""Reading prompts and refusing what would break a run hours later."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from csr_vlm.config.schema import DataConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt
from csr_vlm.data.formats.rows import BadRow, Entry, entry_of, plain
from csr_vlm.data.images import BadImage, load_image, suffix_of
from csr_vlm.data.sources import Source, open_source
from csr_vlm.store.files import store_content

_SHOWN = 20


@dataclass
class InputReport:
    """What was accepted and what was dropped, by reason, with the first few examples."""

    accepted: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def drop(self, reason: str, example: str) -> None:
        self.dropped[reason] += 1
        if len(self.examples) < _SHOWN:
            self.examples.append(f"{example}: {reason}")

    def refuse_or_drop(self, error: ValueError, where: str, config: DataConfig) -> None:
        """Count a bad row, or raise if the configuration wants none."""
        if config.on_bad_input == "refuse":
            raise CsrError(f"{where}: {error}", "mend it, or set data.on_bad_input=skip") from None
        self.drop(str(error), where)

    @property
    def reasons(self) -> str:
        """Each reason with its number, such as ``3 missing, 1 duplicate id``."""
        return ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())

    def dump(self) -> dict[str, Any]:
        return {"accepted": self.accepted, "dropped": dict(self.dropped), "examples": self.examples}


def hold_out(prompts: Iterable[Prompt], number: int, heldout: list[Prompt]) -> Iterator[Prompt]:
    """Yield prompts but for the last ``number`` of them, at most an eighth of all.

    Args:
        heldout: Gets the others, once everything else was yielded.

    Example:
        >>> kept_back = []
        >>> list(hold_out("abcdefgh", 3, kept_back)), kept_back
        (['a', 'b', 'c', 'd', 'e', 'f', 'g'], ['h'])
    """
    waiting: deque[Prompt] = deque()
    total = 0
    for prompt in prompts:
        total += 1
        waiting.append(prompt)
        if len(waiting) > number:
            yield waiting.popleft()
    while len(waiting) > total // 8:
        yield waiting.popleft()
    heldout += waiting


def read_prompts(
    config: DataConfig,
    report: InputReport,
    *,
    seed: int = 0,
    images: Path | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[Prompt]:
    """Yield the valid prompts of all sources, each image decoded once to see that it can be.

    Memory holds one row, a hash of 16 bytes for each accepted id, and, for a sample, a
    number for each prompt drawn.

    Args:
        report: Filled in passing.
        seed: Of the sample, where ``config.sample_seed`` names none.
        images: Folder where images that come as bytes are kept, each under the hash of its
            content; None keeps none, and names them ``sha256:...``.
        tick: Called after each row.

    Raises:
        CsrError: A source cannot be read, or a row is bad and ``on_bad_input`` is refuse.
    """
    drawn = _Sample(config, seed)
    seen: set[bytes] = set()
    for source in sources(config):
        for where, row in source.rows():
            try:
                for prompt in _prompts(entry_of(row, source.root), config, drawn, seen, images):
                    report.accepted += 1
                    yield prompt
                    if config.limit is not None and report.accepted >= config.limit:
                        tick()
                        return
            except (BadRow, BadImage) as error:
                report.refuse_or_drop(error, where, config)
            tick()


def nothing_usable(config: DataConfig, report: InputReport) -> CsrError:
    """Word that all prompts were dropped, or that there were none."""
    what = f"no usable prompt in {', '.join(config.sources)}: {report.reasons or 'it is empty'}"
    if config.image_root is not None and not Path(config.image_root).is_dir():
        return CsrError(what, f"there is no folder {config.image_root}; data.image_root says where the images lie")
    return CsrError(what, "; ".join(report.examples[:3]) or "docs/data.md has the formats")


def sources(config: DataConfig) -> Iterator[Source]:
    """Open the sources of prompts, in their order."""
    for path in config.sources:
        yield from open_source(path, config.format, config.split, config.image_root)


def count_rows(config: DataConfig) -> int:
    """Count the rows that will be read at most, for a progress bar; 0 where a source cannot say."""
    counts = [source.count() for source in sources(config)]
    total = sum(counts) if all(counts) else 0
    return min(total, config.limit) if total and config.limit is not None else total


def usable_image(image: Path | bytes, config: DataConfig, images: Path | None) -> str:
    """Decode an image once and return where it is; see :func:`read_prompts` for ``images``.

    Raises:
        BadImage: It cannot be used.
    """
    load_image(image, config.max_image_pixels)
    if isinstance(image, Path):
        return str(image)
    if images is None:
        return f"sha256:{hashlib.sha256(image).hexdigest()}"
    return str(store_content(images.resolve(), image, suffix_of(image)))


def _prompts(
    entry: Entry, config: DataConfig, drawn: _Sample, seen: set[bytes], images: Path | None
) -> Iterator[Prompt]:
    """Yield the prompts of one row, one a question."""
    image = None
    for prompt_id, text in _asked(entry, config.questions):
        if not text:
            raise BadRow("empty prompt")
        if prompt_id not in drawn:
            continue
        key = _hash(prompt_id)
        if key in seen:
            raise BadRow("duplicate id")
        image = image or usable_image(entry.image, config, images)
        seen.add(key)
        yield Prompt(prompt_id, image, text)


def _asked(entry: Entry, questions: tuple[str, ...]) -> list[tuple[str, str]]:
    """List (prompt id, text); ids get a number only where there are several questions."""
    if len(questions) <= 1:
        return [(entry.row_id, plain(questions[0]) if questions else entry.text)]
    return [(f"{entry.row_id}#{number}", plain(text)) for number, text in enumerate(questions, start=1)]


class _Sample:
    """The ids drawn for ``config.sample``: those with the smallest keyed hashes.

    So the draw depends on the ids and the seed alone, not on the order of the rows, and
    finding the threshold takes a first pass that holds one number a prompt drawn.
    """

    def __init__(self, config: DataConfig, seed: int) -> None:
        self._salt = f"{config.sample_seed if config.sample_seed is not None else seed}:"
        self._largest: int | None = None
        if config.sample is None:
            return
        heap: list[int] = []  # Negated, so that the largest is on top.
        held: set[int] = set()
        for value in self._values(config):
            if value in held or (len(heap) == config.sample and value > -heap[0]):
                continue
            held.add(value)
            heapq.heappush(heap, -value)
            if len(heap) > config.sample:
                held.remove(-heapq.heappop(heap))
        self._largest = -heap[0] if heap else None

    def __contains__(self, prompt_id: str) -> bool:
        return self._largest is None or self._value(prompt_id) <= self._largest

    def _value(self, prompt_id: str) -> int:
        return int.from_bytes(_hash(self._salt + prompt_id), "big")

    def _values(self, config: DataConfig) -> Iterator[int]:
        """Yield a number for each prompt that looks well-formed before its image is opened."""
        for source in sources(config):
            for _, row in source.rows():
                try:
                    asked = _asked(entry_of(row, source.root), config.questions)
                except BadRow:
                    continue
                yield from (self._value(prompt_id) for prompt_id, text in asked if text)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
