"""Describe CHAIR and POPE as suites: the metrics are those of ``csr eval chair`` and ``csr eval pope``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation import chair, pope
from csr_vlm.evaluation.annotations import read_annotations, truth_of
from csr_vlm.evaluation.answers import generation_settings, read_captions, read_protocol
from csr_vlm.evaluation.hallucination.suite import (
    PROTOCOL,
    YES_OR_NO_TOKENS,
    AnswerFile,
    Scoring,
    Suite,
    SuitePart,
)

_TOKENS = 512


class ChairSuite(Suite):
    """Represent CHAIR.

    Args:
        prompts: Prompt file, such as ``csr eval chair-prompts`` writes.
        images: Folder of the images (default: that of the file).
        annotations: Folder of the annotations.
        reader: Finds the objects in a text.
        synonyms: Name of the synonym table, for the protocol.
    """

    name = "chair"

    def __init__(
        self,
        prompts: Path,
        images: Path | None,
        annotations: Path,
        reader: chair.ObjectReader,
        synonyms: str,
        limit: int | None = None,
    ) -> None:
        self._rows = pope.read_rows(prompts)[:limit]
        if any("question_id" in row for row in self._rows):
            raise CsrError(f"{prompts} has questions, not caption prompts", "write one with csr eval chair-prompts")
        self._images = images or prompts.parent
        self._coco = read_annotations(annotations)
        self._reader, self._synonyms = reader, synonyms

    def parts(self) -> Sequence[SuitePart]:
        return [SuitePart("captions", self._rows, self._images, _TOKENS)]

    def score(self, answers: Mapping[str, AnswerFile], scoring: Scoring) -> dict[str, Any]:
        path = answers["captions"].path
        captions = read_captions(path)
        rows = chair.evaluate(captions, truth_of(captions, self._coco, self._reader, path), self._reader)
        protocol = chair.protocol(self._reader, self._synonyms, self._coco.sources)
        return _stored(chair.evaluation_document(rows, protocol), [path])


class PopeSuite(Suite):
    """Represent POPE.

    Args:
        questions: POPE's question files.
        images: Folder of the images (default: that of a file).
    """

    name = "pope"

    def __init__(self, questions: Sequence[Path], images: Path | None, limit: int | None = None) -> None:
        self._files = {pope.read_questions(path).setting: path for path in questions}
        if len(self._files) < len(questions):
            raise CsrError("two question files have the same setting", "give one file of each")
        self._images, self._limit = images, limit

    def parts(self) -> Sequence[SuitePart]:
        return [
            SuitePart(setting, pope.read_rows(path)[: self._limit], self._images or path.parent, YES_OR_NO_TOKENS)
            for setting, path in self._files.items()
        ]

    def score(self, answers: Mapping[str, AnswerFile], scoring: Scoring) -> dict[str, Any]:
        paired = [
            (pope.read_questions(file.prompts, setting), pope.read_answers(file.path))
            for setting, file in answers.items()
        ]
        document = pope.evaluation_document(paired, pope.protocol([questions for questions, _ in paired]))
        return _stored(document, [file.path for file in answers.values()])


def _stored(document: Mapping[str, Any], answers: Sequence[Path]) -> dict[str, Any]:
    """Add the settings that the answers were generated with."""
    generated = generation_settings([read_protocol(path) for path in answers])
    return {**document, "protocol": {**document["protocol"], "suite": PROTOCOL, **generated}}
