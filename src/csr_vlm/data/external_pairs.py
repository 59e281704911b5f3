"""Read preference pairs as texts, in other programs' formats; a run's own pairs are token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from csr_vlm.config.schema import DataConfig
from csr_vlm.core.records import Prompt
from csr_vlm.data.checking import ModelCheck, map_in_order, num_threads
from csr_vlm.data.formats import hadpo, sentinel
from csr_vlm.data.images import BadImage, load_image
from csr_vlm.data.placeholders import remove_placeholders
from csr_vlm.data.preference import Responses, num_user_turns, require_one_prompt
from csr_vlm.data.prompts import InputReport, stored_image
from csr_vlm.data.rows import MAX_TEXT_CHARS, BadRow, Row, empty_prompt, parse_row, unpacked
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
    config: DataConfig,
    report: InputReport,
    *,
    images: Path | None = None,
    tick: Callable[[], None] = lambda: None,
    model: ModelCheck | None = None,
    seen: Callable[[TextPair], TextPair] = lambda pair: pair,
) -> Iterator[TextPair]:
    """Yield the valid pairs of ``config.pairs``; several may share an id.

    Args:
        config: Settings of the data.
        report: Filled while rows are read.
        images: As in :func:`csr_vlm.data.prompts.read_prompts`.
        tick: Called after each row.
        model: Checks that the policy accepts each pair, in threads; its own placeholders are removed from questions.
        seen: Called with each well-formed pair in the order of the rows, before the model's check counts; what it
            returns takes the pair's place.

    Raises:
        CsrError: The file cannot be read, or a row is bad and ``on_bad_input`` is refuse.
    """
    threads = 1 if model is None else num_threads()
    check = partial(_checked, config=config, model=model)
    with closing(map_in_order(check, _located_rows(config), threads)) as checked:
        for draft in checked:
            problem = draft.problem
            if draft.pair is not None:
                prompt = replace(draft.pair.prompt, image=stored_image(draft.image, images))
                pair = seen(replace(draft.pair, prompt=prompt))
                if problem is None:
                    report.accept(draft.removed)
                    yield replace(pair, prompt=replace(pair.prompt, text=draft.question))
            if problem is not None:
                report.refuse_or_drop(problem, draft.position, config)
            tick()


@dataclass(frozen=True)
class _Draft:
    """Hold one row on its way to a pair."""

    position: str
    problem: BadRow | BadImage | None = None
    pair: TextPair | None = None
    """The pair as the file has it, if it is well-formed; its image is not stored yet."""
    image: Path | bytes = b""
    question: str = ""
    """The pair's question without the model's own placeholders."""
    removed: tuple[str, ...] = ()


def _located_rows(config: DataConfig) -> Iterator[tuple[str, Row | BadRow, Path | None]]:
    """Yield (position, row, image root) of all rows."""
    assert config.pairs is not None
    for source in open_source(config.pairs, "auto", config.split, config.image_root):
        for position, row in source.rows():
            yield position, row, source.root


def _checked(located: tuple[str, Row | BadRow, Path | None], config: DataConfig, model: ModelCheck | None) -> _Draft:
    """Parse a row, decode its image, and let the model check the pair."""
    position, row, root = located
    try:
        pair, source = _text_pair(row, root, config)
        image = load_image(source, config.max_image_pixels)
    except (BadRow, BadImage) as error:
        return _Draft(position, error)
    question, removed = remove_placeholders(pair.prompt.text, () if model is None else model.placeholders)
    draft = _Draft(position, None, pair, source, question, removed)
    if not question:
        return replace(draft, problem=BadRow("empty prompt"))
    try:
        if model is not None:
            model.require(question, image, (pair.chosen, pair.rejected))
    except BadRow as error:
        return replace(draft, problem=error)
    return draft


def count_pairs(config: DataConfig) -> int:
    """Count the rows of ``config.pairs`` for a progress bar; 0 if the number is unknown."""
    assert config.pairs is not None
    sources = open_source(config.pairs, "auto", config.split, config.image_root)
    return sum(source.count() for source in sources)


def _text_pair(row: Row | BadRow, root: Path | None, config: DataConfig) -> tuple[TextPair, Path | bytes]:
    """Parse a row; return its pair, whose image is not known yet, and its image.

    Raises:
        BadRow: The row has no usable pair.
    """
    if not isinstance(row, BadRow):
        row = hadpo.completed(unpacked(row), lambda name: root is not None and (root / name).is_file())
    parsed = parse_row(row, root, follow_links=config.follow_links)
    assert not isinstance(row, BadRow)
    if not parsed.text:
        raise empty_prompt(row)
    if sentinel.responses(row) is None and num_user_turns(row) > 1:
        raise BadRow("several turns")
    require_one_prompt(row)
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
    pair = TextPair(Prompt(parsed.row_id, "", parsed.text), chosen, rejected, chosen_ends, rejected_ends)
    return pair, parsed.image


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
