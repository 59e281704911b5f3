"""Read prompts, and reject everything that would fail a run hours later."""

from __future__ import annotations

import hashlib
import heapq
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from csr_vlm.config.schema import DataConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.formatting import counts
from csr_vlm.core.records import Prompt
from csr_vlm.data.checking import ModelCheck, map_in_order, num_threads
from csr_vlm.data.images import BadImage, load_image, suffix_of
from csr_vlm.data.placeholders import remove_placeholders
from csr_vlm.data.rows import BadRow, ParsedRow, Row, empty_prompt, parse_row, strip_placeholders
from csr_vlm.data.sources import Source, open_source
from csr_vlm.store.files import store_content

_MAX_EXAMPLES = 20
_SHOWN_EXAMPLES = 5


@dataclass
class InputReport:
    """Count what was accepted and, by reason, what was dropped, with the first examples."""

    accepted: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    removed: Counter[str] = field(default_factory=Counter)
    """Number of accepted rows by the model's placeholder that was removed from them."""

    def accept(self, removed: Sequence[str] = ()) -> None:
        """Count one accepted row, and the placeholders that were removed from it."""
        self.accepted += 1
        self.removed.update(removed)

    def drop(self, reason: str, example: str, detail: str = "") -> None:
        """Count one dropped row."""
        self.dropped[reason] += 1
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append(f"{example}: {reason}" + (f": {detail}" if detail else ""))

    def refuse_or_drop(self, error: ValueError, position: str, config: DataConfig) -> None:
        """Count a bad row.

        Raises:
            CsrError: ``config.on_bad_input`` is refuse.
        """
        detail = getattr(error, "detail", "")
        if config.on_bad_input == "refuse":
            message = f"{position}: {error}" + (f": {detail}" if detail else "")
            raise CsrError(message, "fix it, or set data.on_bad_input=skip") from None
        self.drop(str(error), position, detail)

    @property
    def reasons(self) -> str:
        """Return each reason with its count, such as ``3 missing, 1 duplicate id``."""
        return counts(self.dropped)

    def messages(self, rows: str) -> Iterator[str]:
        """Yield what a user should know: the rows that were dropped, each of the first by its position.

        Args:
            rows: What the rows are, in the plural: prompts, pairs.
        """
        if self.removed:
            tokens = ", ".join(f"{token} from {count}" for token, count in self.removed.items())
            yield f"removed the model's own placeholders from {rows}: {tokens}"
        if self.dropped:
            shown = self.examples[:_SHOWN_EXAMPLES]
            more = self.dropped.total() - len(shown)
            yield "\n  ".join(
                [
                    f"dropped {self.dropped.total()} {rows if self.dropped.total() > 1 else rows[:-1]}: {self.reasons}",
                    *shown,
                    *([f"and {more} more"] if more else []),
                ]
            )

    def dump(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        removed = {"removed": dict(self.removed)} if self.removed else {}
        return {"accepted": self.accepted, "dropped": dict(self.dropped), "examples": self.examples, **removed}


def hold_out(prompts: Iterable[Prompt], number: int, heldout: list[Prompt]) -> Iterator[Prompt]:
    """Yield all prompts except the last ``number``, but hold out at most an eighth of all.

    Args:
        prompts: All prompts.
        number: Number to hold out at most.
        heldout: List to which the held-out prompts are added after the others were yielded.

    Example:
        >>> heldout = []
        >>> list(hold_out("abcdefgh", 3, heldout)), heldout
        (['a', 'b', 'c', 'd', 'e', 'f', 'g'], ['h'])
    """
    pending: deque[Prompt] = deque()
    total = 0
    for prompt in prompts:
        total += 1
        pending.append(prompt)
        if len(pending) > number:
            yield pending.popleft()
    while len(pending) > total // 8:
        yield pending.popleft()
    heldout += pending


def read_prompts(
    config: DataConfig,
    report: InputReport,
    *,
    seed: int = 0,
    images: Path | None = None,
    tick: Callable[[], None] = lambda: None,
    model: ModelCheck | None = None,
) -> Iterator[Prompt]:
    """Yield the valid prompts of all sources. Each image is decoded once to check it.

    Memory holds some rows, a 16-byte hash per accepted id and, for a sample, one number per
    sampled prompt.

    Args:
        config: Settings of the data.
        report: Filled while rows are read.
        seed: Seed of the sample if ``config.sample_seed`` is None.
        images: Folder to which images that come as bytes are written, each under the hash of its
            content; if None, they are not written and their path is ``sha256:...``.
        tick: Called after each row.
        model: Checks that the policy accepts each prompt, in threads; its own placeholders are removed.

    Raises:
        CsrError: A source cannot be read, or a row is bad and ``on_bad_input`` is refuse.
    """
    rows = read_prompt_rows(config, report, seed=seed, images=images, tick=tick, model=model)
    return (prompt for prompt, _ in rows)


def read_prompt_rows(
    config: DataConfig,
    report: InputReport,
    *,
    seed: int = 0,
    images: Path | None = None,
    tick: Callable[[], None] = lambda: None,
    model: ModelCheck | None = None,
) -> Iterator[tuple[Prompt, Row]]:
    """Yield the valid prompts as :func:`read_prompts` does, each with the row that it comes from."""
    drafts = _drafts(config, seed, () if model is None else model.placeholders)
    threads = 1 if model is None else num_threads()
    with closing(map_in_order(partial(_checked, config=config, model=model), drafts, threads)) as checked:
        for draft in checked:
            for question in draft.questions:
                if question.problem is not None:
                    report.refuse_or_drop(question.problem, draft.position, config)
                    continue
                report.accept(question.removed)
                yield Prompt(question.prompt_id, stored_image(draft.image, images), question.text), draft.row
                if config.limit is not None and report.accepted >= config.limit:
                    tick()
                    return
            if draft.problem is not None:
                report.refuse_or_drop(draft.problem, draft.position, config)
            tick()


def no_usable_prompt(config: DataConfig, report: InputReport) -> CsrError:
    """Return the error for sources that are empty or whose prompts were all dropped."""
    message = f"no usable prompt in {', '.join(config.sources)}: {report.reasons or 'it is empty'}"
    if config.image_root is not None and not Path(config.image_root).is_dir():
        return CsrError(
            message, f"there is no folder {config.image_root}; set data.image_root to the folder of the images"
        )
    return CsrError(message, "; ".join(report.examples[:3]) or "see docs/data.md for the formats")


def sources(config: DataConfig) -> Iterator[Source]:
    """Open the sources of prompts in their order."""
    for path in config.sources:
        yield from open_source(path, config.format, config.split, config.image_root)


def count_rows(config: DataConfig) -> int:
    """Return an upper bound of the rows that will be read, for a progress bar; 0 if it is unknown."""
    counts = [source.count() for source in sources(config)]
    total = sum(counts) if all(counts) else 0
    return min(total, config.limit) if total and config.limit is not None else total


def stored_image(image: Path | bytes, images: Path | None) -> str:
    """Return the path of an image, after writing one that comes as bytes; see :func:`read_prompts` for ``images``."""
    if isinstance(image, Path):
        return str(image)
    if images is None:
        return f"sha256:{hashlib.sha256(image).hexdigest()}"
    return str(store_content(images.resolve(), image, suffix_of(image)))


@dataclass(frozen=True)
class _Question:
    """Hold one question of a row."""

    prompt_id: str
    text: str
    removed: tuple[str, ...]
    """Placeholders that were removed from the text."""
    problem: BadRow | None = None


@dataclass(frozen=True)
class _Draft:
    """Hold one row on its way to prompts."""

    position: str
    row: Row = field(default_factory=dict)
    image: Path | bytes = b""
    questions: tuple[_Question, ...] = ()
    problem: BadRow | BadImage | None = None
    """Reason why the row, or the rest of its questions, is unusable."""


def _drafts(config: DataConfig, seed: int, placeholders: Sequence[str]) -> Iterator[_Draft]:
    """Parse all rows; yield one draft per row."""
    sample, names = _Sample(config, seed, placeholders), _Names()
    for source in sources(config):
        for position, row in source.rows():
            questions: list[_Question] = []
            draft = _Draft(position)
            try:
                parsed = parse_row(row, source.root, follow_links=config.follow_links)
                assert not isinstance(row, BadRow)
                draft = replace(draft, row=row, image=parsed.image)
                for question in _questions(parsed, row, config.questions, placeholders):
                    unique_id = names.unique(question.prompt_id, question.text, parsed.image)
                    if (unique_id or question.prompt_id) not in sample:
                        continue
                    if unique_id is None:
                        raise BadRow("duplicate id")
                    questions.append(replace(question, prompt_id=unique_id))
            except BadRow as error:
                draft = replace(draft, problem=error)
            yield replace(draft, questions=tuple(questions))


def _checked(draft: _Draft, config: DataConfig, model: ModelCheck | None) -> _Draft:
    """Decode the image of a row, and let the model check its questions."""
    if not draft.questions:
        return draft
    try:
        image = load_image(draft.image, config.max_image_pixels)
    except BadImage as error:
        return replace(draft, questions=(), problem=error)
    if model is None:
        return draft
    return replace(draft, questions=tuple(_required(question, image, model) for question in draft.questions))


def _required(question: _Question, image: Image.Image, model: ModelCheck) -> _Question:
    try:
        model.require(question.text, image)
    except BadRow as error:
        return replace(question, problem=error)
    return question


def _questions(
    parsed: ParsedRow, row: Row, questions: tuple[str, ...], placeholders: Sequence[str]
) -> Iterator[_Question]:
    """Yield the questions of a row without placeholders; ids are numbered only if there are several.

    Raises:
        BadRow: A question is empty.
    """
    texts = questions or (parsed.text,)
    for number, text in enumerate(texts, start=1):
        cleaned, removed = remove_placeholders(strip_placeholders(text), placeholders)
        if not cleaned:
            raise empty_prompt(row)
        yield _Question(f"{parsed.row_id}#{number}" if len(texts) > 1 else parsed.row_id, cleaned, removed)


class _Names:
    """Make ids unique: a second row with the id A becomes A#2, a repetition of the same question is refused.

    LLaVA's mixture, for example, repeats an id for every dialogue about an image.
    """

    def __init__(self) -> None:
        self._rows: dict[bytes, int] = {}
        """Hash of an id to the hash of the row that has it."""
        self._repeated: set[int] = set()
        """Hashes of the rows whose ids were numbered."""
        self._counts: dict[bytes, int] = {}

    def unique(self, prompt_id: str, text: str, image: Path | bytes) -> str | None:
        """Return an id that no earlier row has; None if an earlier row has the same id, question and image."""
        key = _hash(prompt_id)
        content = image if isinstance(image, bytes) else os.fsencode(image)
        digest = hashlib.blake2b(content + b"\0" + text.encode(), key=key, digest_size=7).digest()
        row = int.from_bytes(digest, "big")
        if self._rows.get(key) == row or row in self._repeated:
            return None
        unique_id = prompt_id
        if key in self._rows:
            self._repeated.add(row)
        while _hash(unique_id) in self._rows:
            self._counts[key] = self._counts.get(key, 1) + 1
            unique_id = f"{prompt_id}#{self._counts[key]}"
        self._rows[_hash(unique_id)] = row
        return unique_id


class _Sample:
    """Draw ``config.sample`` ids: those with the smallest salted hashes.

    The sample depends only on the ids and the seed, not on the order of the rows. Finding the
    threshold takes a first pass over the rows that holds one number per sampled prompt.
    """

    def __init__(self, config: DataConfig, seed: int, placeholders: Sequence[str]) -> None:
        self._placeholders = placeholders
        self._salt = f"{config.sample_seed if config.sample_seed is not None else seed}:"
        self._largest: int | None = None
        if config.sample is None:
            return
        heap: list[int] = []  # Negated, so that the largest hash is first.
        in_heap: set[int] = set()
        for value in self._values(config):
            if value in in_heap or (len(heap) == config.sample and value > -heap[0]):
                continue
            in_heap.add(value)
            heapq.heappush(heap, -value)
            if len(heap) > config.sample:
                in_heap.remove(-heapq.heappop(heap))
        self._largest = -heap[0] if heap else None

    def __contains__(self, prompt_id: str) -> bool:
        return self._largest is None or self._value(prompt_id) <= self._largest

    def _value(self, prompt_id: str) -> int:
        return int.from_bytes(_hash(self._salt + prompt_id), "big")

    def _values(self, config: DataConfig) -> Iterator[int]:
        """Yield the hash of each prompt that is well-formed, before any image is opened."""
        names = _Names()
        for source in sources(config):
            for _, row in source.rows():
                try:
                    parsed = parse_row(row, source.root, follow_links=config.follow_links)
                    assert not isinstance(row, BadRow)
                    for question in _questions(parsed, row, config.questions, self._placeholders):
                        unique_id = names.unique(question.prompt_id, question.text, parsed.image)
                        if unique_id is not None:
                            yield self._value(unique_id)
                except BadRow:
                    continue


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
