"""Letting a policy answer what a benchmark asks, with the protocol beside the answers.

A prompt file with ``question_id`` (POPE's) gives answers, any other gives captions:

    {"question_id": 1, "answer": "Yes."}
    {"id": "a", "image_id": 42, "caption": "A dog."}

Beside OUT.jsonl stands OUT.protocol.json: what was asked, about which images, and how the
answer was decoded. A number computed from the answers carries it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from csr_vlm.config.schema import DataConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Finish, Prompt
from csr_vlm.data.prompts import InputReport, read_prompts
from csr_vlm.evaluation.chair import Caption
from csr_vlm.evaluation.pope import read_rows
from csr_vlm.store import files

_CHOSEN = {
    "prompt": "texts", "ids": "prompts", "num_prompts": "num_prompts", "decoding": "decoding",
    "max_new_tokens": "max_new_tokens", "seed": "seed", "drop_unfinished": "drop_unfinished",
}  # fmt: skip
"""What identifies how answers were generated: its name in an evaluation, and in the protocol beside the answers."""
_COCO_FILE = re.compile(r"(?:COCO_\w+_)?(\d{6,12})\.\w+")
_COMPLETE = re.compile(r".*[.!?](?=\s|$|[\"'”’)])", re.DOTALL)


@dataclass(frozen=True)
class Asked:
    """One row of a prompt file."""

    prompt: Prompt
    question_id: int | str | None
    """What POPE calls it; None asks for a caption."""
    image_id: int | str
    """What the annotations call the image: the row's own, COCO's number, or the file name."""


@dataclass(frozen=True)
class Decoding:
    """How a response is written: the part of the protocol that one chooses."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 decodes greedily."""
    seed: int = 0
    drop_unfinished: bool = True
    """Whether a caption that ran into the limit loses its last, unfinished sentence."""


Respond = Callable[[Sequence[Prompt]], Iterable[tuple[str, Finish]]]
"""Prompts to text and why it ended."""


def read_asked(path: Path, image_root: Path | None = None, limit: int | None = None) -> list[Asked]:
    """Read a prompt file, each image decoded once to see that it can be.

    Raises:
        CsrError: A row is unusable; nothing is skipped, since a benchmark is all its rows.
    """
    config = DataConfig(
        prompts=str(path),
        image_root=str(image_root) if image_root else None,
        limit=limit,
        on_bad_input="refuse",
    )
    try:
        prompts = list(read_prompts(config, InputReport()))
    except CsrError as error:
        raise CsrError(error.message, "mend it, or give the folder of the images by --images") from None
    if not prompts:
        raise CsrError(f"{path} holds no prompt", "one JSON object a line: id, image, text")
    rows = read_rows(path)[: len(prompts)]
    return [
        Asked(prompt, row.get("question_id"), row.get("image_id", image_id_of(str(row["image"]))))
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def image_id_of(image: str) -> int | str:
    """Return the number in a name such as COCO_val2014_000000000042.jpg, else the file name."""
    name = Path(image).name
    match = _COCO_FILE.fullmatch(name)
    return int(match.group(1)) if match else name


def answer(
    asked: Sequence[Asked], respond: Respond, decoding: Decoding, origin: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Answer every prompt.

    Args:
        origin: Which policy answers; goes into the protocol.

    Returns:
        The rows to write and the protocol, whose ``id`` is a hash of all that was chosen:
        prompts, images and decoding, not of who answered.
    """
    rows: list[dict[str, Any]] = []
    unfinished = 0
    for item, (text, finish) in zip(asked, respond([item.prompt for item in asked]), strict=True):
        unfinished += finish is Finish.LENGTH
        if item.question_id is not None:
            rows.append({"question_id": item.question_id, "answer": text.strip()})
            continue
        kept = finished_part(text) if decoding.drop_unfinished and finish is Finish.LENGTH else text
        rows.append({"id": item.prompt.prompt_id, "image_id": item.image_id, "caption": kept.strip()})
    questions = sorted({item.prompt.text for item in asked})
    chosen = {
        **asdict(decoding),
        "decoding": "greedy" if decoding.temperature == 0 else f"sampled at temperature {decoding.temperature}",
        "prompts": files.digest([[str(item.image_id), item.prompt.prompt_id, item.prompt.text] for item in asked]),
        "num_prompts": len(asked),
    }
    protocol = {
        "id": files.digest(chosen),
        **chosen,
        "num_different_texts": len(questions),
        "texts": questions[:5],
        "unfinished": unfinished,
        "empty": sum(not (row.get("caption") or row.get("answer")) for row in rows),
        "policy": origin,
    }
    return rows, protocol


def finished_part(text: str) -> str:
    """Return a text up to the end of its last complete sentence; nothing if it has none."""
    match = _COMPLETE.match(text)
    return match.group() if match else ""


def write_answers(out: Path, rows: Sequence[dict[str, Any]], protocol: dict[str, Any]) -> None:
    files.write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    files.write_json(protocol_path(out), {**protocol, "sha256": files.sha256_of(out)})


def protocol_path(answers: Path) -> Path:
    return answers.with_suffix(".protocol.json")


def read_protocol(answers: Path) -> dict[str, Any] | None:
    """Return the protocol beside an answer file, or None where it is absent, damaged, or of another file."""
    try:
        protocol = files.read_document(protocol_path(answers))
    except CsrError:
        return None
    return protocol if protocol.get("sha256") == files.sha256_of(answers) else None


def chosen_in(protocols: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """Return how answers were generated, without what came of it, so that two policies' can be compared.

    Args:
        protocols: As :func:`read_protocol` returns them, one an answer file.
    """
    known = [protocol for protocol in protocols if protocol is not None]
    if len(known) < len(protocols):
        return {"generation": "not known"}
    columns = {name: [protocol[field] for protocol in known] for name, field in _CHOSEN.items()}
    return {name: values[0] if values.count(values[0]) == len(values) else values for name, values in columns.items()}


def read_captions(path: Path) -> list[Caption]:
    """Read captions: JSON lines with image_id, caption, and an id unless the image's serves.

    Raises:
        CsrError: A row lacks an image or a caption, or there is no row.
    """
    captions = []
    for number, row in enumerate(read_rows(path), start=1):
        image_id, text = row.get("image_id"), row.get("caption")
        if not isinstance(image_id, int | str) or not isinstance(text, str):
            raise CsrError(
                f"{path}, row {number}: no image_id or no caption", 'as {"id": 1, "image_id": 42, "caption": "A dog."}'
            )
        captions.append(Caption(row.get("id", image_id), image_id, text))
    if not captions:
        raise CsrError(f"{path} holds no caption", 'as {"id": 1, "image_id": 42, "caption": "A dog."}')
    return captions
