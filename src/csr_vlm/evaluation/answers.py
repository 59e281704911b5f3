"""Have a policy answer a benchmark's prompts, and keep the protocol beside the answers.

A prompt file whose rows have a ``question_id`` (such as POPE's) yields answers, any other yields captions:

    {"question_id": 1, "answer": "Yes."}
    {"id": "a", "image_id": 42, "caption": "A dog."}

``OUT.protocol.json`` is written beside ``OUT.jsonl`` and records the prompts, the images and the
decoding settings. Every metric computed from the answers carries it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from csr_vlm.config.schema import DataConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Finish, Prompt
from csr_vlm.data.checking import ModelCheck
from csr_vlm.data.prompts import InputReport, read_prompt_rows
from csr_vlm.data.rows import BadRow, Row, row_image
from csr_vlm.evaluation.chair import Caption
from csr_vlm.evaluation.pope import read_rows
from csr_vlm.store import files

_SETTINGS = {
    "prompt": "texts", "ids": "prompts", "num_prompts": "num_prompts", "decoding": "decoding",
    "max_new_tokens": "max_new_tokens", "seed": "seed", "drop_unfinished": "drop_unfinished",
}  # fmt: skip
"""Settings that identify how answers were generated: name in an evaluation to name in the answers' protocol."""
_COCO_FILE = re.compile(r"(?:COCO_\w+_)?(\d{6,12})\.\w+")
_COMPLETE = re.compile(r".*[.!?](?=\s|$|[\"'”’)])", re.DOTALL)
_CAPTION_EXAMPLE = 'such as {"id": 1, "image_id": 42, "caption": "A dog."}'


@dataclass(frozen=True)
class EvaluationPrompt:
    """Represent one row of a benchmark's prompt file."""

    prompt: Prompt
    question_id: int | str | None
    """POPE's id of the question; None where the row asks for a caption."""
    image_id: int | str
    """Id of the image in the annotations: the row's ``image_id``, COCO's number, or the file name."""


@dataclass(frozen=True)
class AnswerSettings:
    """Configure how answers are decoded: the part of the protocol that the user chooses."""

    max_new_tokens: int
    temperature: float = 0.0
    """Sampling temperature; 0 means greedy decoding."""
    seed: int = 0
    drop_unfinished: bool = True
    """Whether a caption that reaches the token limit loses its last, incomplete sentence."""


Respond = Callable[[Sequence[Prompt]], Iterable[tuple[str, Finish]]]
"""Maps prompts to pairs of response text and finish reason, in order."""


def read_evaluation_prompts(
    path: Path,
    image_root: Path | None = None,
    limit: int | None = None,
    images: Path | None = None,
    model: ModelCheck | None = None,
) -> list[EvaluationPrompt]:
    """Read a prompt file and decode each image once to check it.

    Args:
        path: File in any format of ``data.prompts``.
        image_root: Folder of the images; by default the file's own.
        limit: Number of prompts to read.
        images: Folder for images that come as bytes.
        model: Puts every prompt through the processor of the model that will answer.

    Raises:
        CsrError: A row is unusable. No row is skipped, because a benchmark is defined by all of its rows.
    """
    config = DataConfig(
        prompts=str(path),
        image_root=str(image_root) if image_root else None,
        limit=limit,
        on_bad_input="refuse",
    )
    try:
        rows = list(read_prompt_rows(config, InputReport(), images=images, model=model))
    except CsrError as error:
        raise CsrError(error.message, "fix the row, or pass the folder of the images with --images") from None
    if not rows:
        raise CsrError(f"{path} contains no prompts", "write one JSON object per line with id, image and text")
    return [EvaluationPrompt(prompt, row.get("question_id"), _image_id(prompt, row)) for prompt, row in rows]


def _image_id(prompt: Prompt, row: Row) -> int | str:
    """Return the row's ``image_id``, or the id in the name under which the row refers to its image."""
    if isinstance(given := row.get("image_id"), int | str):
        return given
    name = row_image(row)
    return image_id_of(name.replace("\\", "/") if isinstance(name, str) else prompt.image)


def image_id_of(image: str) -> int | str:
    """Return the number in a name such as COCO_val2014_000000000042.jpg, otherwise the file name."""
    name = Path(image).name
    match = _COCO_FILE.fullmatch(name)
    return int(match.group(1)) if match else name


def answer_prompts(
    prompts: Sequence[EvaluationPrompt], respond: Respond, settings: AnswerSettings, policy: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Answer every prompt.

    Args:
        policy: Description of the policy that answers, for the protocol.

    Returns:
        The rows to write and the protocol. The protocol's ``id`` is a hash of prompts, images
        and decoding settings; it does not depend on the policy.
    """
    rows: list[dict[str, Any]] = []
    num_unfinished = 0
    for item, (text, finish) in zip(prompts, respond([item.prompt for item in prompts]), strict=True):
        num_unfinished += finish is Finish.LENGTH
        if item.question_id is not None:
            rows.append({"question_id": item.question_id, "answer": text.strip()})
            continue
        kept = complete_sentences(text) if settings.drop_unfinished and finish is Finish.LENGTH else text
        rows.append({"id": item.prompt.prompt_id, "image_id": item.image_id, "caption": kept.strip()})
    texts = sorted({item.prompt.text for item in prompts})
    protocol = {
        **identity_of(prompts, settings),
        "num_different_texts": len(texts),
        "texts": texts[:5],
        "unfinished": num_unfinished,
        "empty": sum(not (row.get("caption") or row.get("answer")) for row in rows),
        "policy": policy,
    }
    return rows, protocol


def identity_of(prompts: Sequence[EvaluationPrompt], settings: AnswerSettings) -> dict[str, Any]:
    """Return the choices that identify how prompts are answered, and ``id``, their hash."""
    identity = {
        **asdict(settings),
        "decoding": "greedy" if settings.temperature == 0 else f"sampled at temperature {settings.temperature}",
        "prompts": files.digest([[str(item.image_id), item.prompt.prompt_id, item.prompt.text] for item in prompts]),
        "num_prompts": len(prompts),
    }
    return {"id": files.digest(identity), **identity}


def complete_sentences(text: str) -> str:
    """Return a text up to the end of its last complete sentence; the empty string if it has none."""
    match = _COMPLETE.match(text)
    return match.group() if match else ""


def write_answers(out: Path, rows: Sequence[dict[str, Any]], protocol: dict[str, Any]) -> None:
    """Write the rows as JSON lines, and the protocol with their SHA-256 beside them."""
    files.write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    files.write_json(protocol_path(out), {**protocol, "sha256": files.sha256_of(out)})


def protocol_path(answers: Path) -> Path:
    """Return the path of the protocol that belongs to an answer file."""
    return answers.with_suffix(".protocol.json")


def read_protocol(answers: Path) -> dict[str, Any] | None:
    """Return the protocol of an answer file; None where it is missing, damaged or of another file's content."""
    try:
        protocol = files.read_document(protocol_path(answers))
    except CsrError:
        return None
    return protocol if protocol.get("sha256") == files.sha256_of(answers) else None


def generation_settings(protocols: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """Return the settings that answers were generated with, without their outcome.

    Evaluations of two policies are comparable where these settings are equal.

    Args:
        protocols: Results of :func:`read_protocol`, one per answer file.
    """
    known = [protocol for protocol in protocols if protocol is not None]
    if len(known) < len(protocols):
        return {"generation": "not known"}
    columns = {name: [protocol[field] for protocol in known] for name, field in _SETTINGS.items()}
    return {name: values[0] if values.count(values[0]) == len(values) else values for name, values in columns.items()}


def _captioned_image(row: Mapping[str, Any]) -> int | str | None:
    """Return the ``image_id`` of a caption, which a table may hold as a float, or the id in the image's name."""
    given = row.get("image_id")
    if isinstance(given, float) and given.is_integer():
        return int(given)
    if isinstance(given, int | str) and given != "":
        return given
    try:
        name = row_image(row)
    except BadRow:
        return None
    return image_id_of(name.replace("\\", "/")) if isinstance(name, str) else None


def read_captions(path: Path) -> list[Caption]:
    """Read captions from JSON lines with ``image_id``, ``caption`` and optionally ``id`` (default: ``image_id``).

    Raises:
        CsrError: A row lacks an image or a caption, or the file has no rows.
    """
    captions = []
    for number, row in enumerate(read_rows(path), start=1):
        image_id, text = _captioned_image(row), row.get("caption")
        if image_id is None or not isinstance(text, str):
            found = ", ".join(map(str, row))[:200]
            raise CsrError(
                f"{path}, row {number}: image_id or caption is missing",
                f"write rows {_CAPTION_EXAMPLE}; the row has {found}",
            )
        captions.append(Caption(row.get("id", image_id), image_id, text))
    if not captions:
        raise CsrError(f"{path} contains no captions", f"write one row per caption, {_CAPTION_EXAMPLE}")
    return captions
