"""Pairs from and for other programs: texts, where a run's own pairs are token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from csr_vlm.config.schema import DataConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Pair, Prompt
from csr_vlm.data.formats.preference import Item, Responses, image_bytes, user_turns
from csr_vlm.data.formats.rows import LONGEST_TEXT, BadRow, Row, entry_of
from csr_vlm.data.images import BadImage, suffix_of
from csr_vlm.data.prompts import InputReport, usable_image
from csr_vlm.data.sources import PAIR_FORMATS, open_source
from csr_vlm.store.files import store_content


@dataclass(frozen=True)
class TextPair:
    """A preference between two texts that nobody has tokenised yet."""

    prompt: Prompt
    chosen: str
    rejected: str


def read_text_pairs(
    config: DataConfig, report: InputReport, *, images: Path | None = None, tick: Callable[[], None] = lambda: None
) -> Iterator[TextPair]:
    """Yield the valid pairs of ``config.pairs``; several may share an id.

    Args:
        report: Filled in passing.
        images: As in :func:`csr_vlm.data.prompts.read_prompts`.
        tick: Called after each row.

    Raises:
        CsrError: The file cannot be read, or a row is bad and ``on_bad_input`` is refuse.
    """
    assert config.pairs is not None
    for source in open_source(config.pairs, "auto", config.split, config.image_root):
        for where, row in source.rows():
            try:
                pair = _text_pair(row, source.root, config, images)
            except (BadRow, BadImage) as error:
                report.refuse_or_drop(error, where, config)
            else:
                report.accepted += 1
                yield pair
            tick()


def count_pairs(config: DataConfig) -> int:
    """Count the rows of ``config.pairs``, for a progress bar; 0 where it cannot say."""
    assert config.pairs is not None
    return sum(s.count() for s in open_source(config.pairs, "auto", config.split, config.image_root))


def write_pairs(pairs: Iterable[Pair], form: str, out: Path, *, copy_images: bool, origin: str) -> Path:
    """Write pairs in another program's format, one at a time.

    Args:
        pairs: Those of a run's iteration.
        form: One of :data:`csr_vlm.data.sources.PAIR_FORMATS`.
        out: Folder that the files go to; others in it are left alone.
        copy_images: Put the images into the file where the format can hold them, else beside
            it under ``images/`` with relative paths; otherwise paths are absolute.
        origin: The policy that made the pairs.

    Returns:
        The main file.

    Raises:
        CsrError: An image is gone, or ``out`` cannot be written to.
    """
    module = PAIR_FORMATS[form]

    def item(pair: Pair) -> Item:
        image = pair.prompt.image
        if copy_images and not module.EMBEDS:
            content = image_bytes(image)
            kept = store_content(out / "images", content, Path(image).suffix.lower() or suffix_of(content))
            image = kept.relative_to(out).as_posix()
        return Item(pair, image, copy_images, origin)

    try:
        out.mkdir(parents=True, exist_ok=True)
        written: Path = module.write(map(item, pairs), out)
    except OSError as error:
        raise CsrError(f"{out} cannot be written to: {error.strerror}", "give another --out") from None
    return written


def _text_pair(row: Row | BadRow, root: Path | None, config: DataConfig, images: Path | None) -> TextPair:
    entry = entry_of(row, root)
    assert not isinstance(row, BadRow)
    if not entry.text:
        raise BadRow("empty prompt")
    if user_turns(row) > 1:
        raise BadRow("several turns")
    chosen, rejected = (text.strip() for text in _responses(row, config.pairs_format))
    if not chosen or not rejected:
        raise BadRow("no chosen or no rejected response")
    if max(len(chosen), len(rejected)) > LONGEST_TEXT:
        raise BadRow(f"response of more than {LONGEST_TEXT:,} characters")
    if chosen == rejected:
        raise BadRow("identical responses")
    try:
        f"{chosen}{rejected}".encode()
    except UnicodeEncodeError:
        raise BadRow("text or path that cannot be encoded or resolved") from None
    prompt = Prompt(entry.row_id, usable_image(entry.image, config, images), entry.text)
    return TextPair(prompt, chosen, rejected)


def _responses(row: Row, form: str) -> Responses:
    """Find a row's two responses in the named format, or in the first that fits."""
    for module in PAIR_FORMATS.values() if form == "auto" else (PAIR_FORMATS[form],):
        found: Responses | None = module.responses(row)
        if found is not None:
            return found
    raise BadRow("no chosen or no rejected response")
