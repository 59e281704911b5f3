"""Read preference pairs as texts, in other programs' formats; a run's own pairs are token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from csr_vlm.config.schema import DataConfig
from csr_vlm.core.records import Prompt
from csr_vlm.data.formats import hadpo, sentinel
from csr_vlm.data.images import BadImage
from csr_vlm.data.preference import Responses, num_user_turns
from csr_vlm.data.prompts import InputReport, check_image
from csr_vlm.data.rows import MAX_TEXT_CHARS, BadRow, Row, parse_row, unpacked
from csr_vlm.data.sources import PAIR_READERS, open_source


@dataclass(frozen=True)
class TextPair:
    """Hold a preference between two texts that are not tokenized yet."""

    prompt: Prompt
    chosen: str
    rejected: str
    chosen_ends: bool = True
    """Whether the chosen response ends here; a pair of sentences after the same context (SENTINEL) ends neither."""
    rejected_ends: bool = True


def read_text_pairs(
    config: DataConfig, report: InputReport, *, images: Path | None = None, tick: Callable[[], None] = lambda: None
) -> Iterator[TextPair]:
    """Yield the valid pairs of ``config.pairs``; several may share an id.

    Args:
        config: Settings of the data.
        report: Filled while rows are read.
        images: As in :func:`csr_vlm.data.prompts.read_prompts`.
        tick: Called after each row.

    Raises:
        CsrError: The file cannot be read, or a row is bad and ``on_bad_input`` is refuse.
    """
    assert config.pairs is not None
    for source in open_source(config.pairs, "auto", config.split, config.image_root):
        for position, row in source.rows():
            try:
                pair = _text_pair(row, source.root, config, images)
            except (BadRow, BadImage) as error:
                report.refuse_or_drop(error, position, config)
            else:
                report.accepted += 1
                yield pair
            tick()


def count_pairs(config: DataConfig) -> int:
    """Count the rows of ``config.pairs`` for a progress bar; 0 if the number is unknown."""
    assert config.pairs is not None
    sources = open_source(config.pairs, "auto", config.split, config.image_root)
    return sum(source.count() for source in sources)


def _text_pair(row: Row | BadRow, root: Path | None, config: DataConfig, images: Path | None) -> TextPair:
    if not isinstance(row, BadRow):
        row = hadpo.completed(unpacked(row), lambda name: root is not None and (root / name).is_file())
    parsed = parse_row(row, root, follow_links=config.follow_links)
    assert not isinstance(row, BadRow)
    if not parsed.text:
        raise BadRow("empty prompt")
    if sentinel.responses(row) is None and num_user_turns(row) > 1:
        raise BadRow("several turns")
    chosen, rejected = (text.strip() for text in _responses(row, config.pairs_format))
    chosen_ends, rejected_ends = sentinel.ends(row)
    if not chosen or not rejected:
        raise BadRow("no chosen or no rejected response")
    if max(len(chosen), len(rejected)) > MAX_TEXT_CHARS:
        raise BadRow(f"response of more than {MAX_TEXT_CHARS:,} characters")
    if chosen == rejected and chosen_ends == rejected_ends:
        raise BadRow("identical responses")
    try:
        f"{chosen}{rejected}".encode()
    except UnicodeEncodeError:
        raise BadRow("text or path that cannot be encoded or resolved") from None
    prompt = Prompt(parsed.row_id, check_image(parsed.image, config, images), parsed.text)
    return TextPair(prompt, chosen, rejected, chosen_ends, rejected_ends)


def _responses(row: Row, format_name: str) -> Responses:
    """Extract a row's two responses in the named format, or for ``auto`` in the first that fits.

    SENTINEL's fields come first: exports of pairs that do not end have them beside those of their format.
    """
    for module in (sentinel, *(PAIR_READERS.values() if format_name == "auto" else (PAIR_READERS[format_name],))):
        responses: Responses | None = module.responses(row)
        if responses is not None:
            return responses
    present = [name for name in map(str, row) if name != "__key__" and name.isprintable()]
    raise BadRow(
        "no chosen or no rejected response",
        f"expected chosen and rejected, rejected_conversations, rejected_response, rejected_messages, or y_win and "
        f"y_lose; the row has {', '.join(present[:12])[:200]}",
    )
