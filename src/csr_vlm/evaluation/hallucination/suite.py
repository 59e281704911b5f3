"""Define what a benchmark of ``csr eval hallucination`` consists of: prompts, limits, and a rule that scores answers.

To add a benchmark, write a subclass of :class:`Suite` in a module of this folder and add it to
:data:`csr_vlm.evaluation.hallucination.suites.SUITES`.
"""

from __future__ import annotations

import ast
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.answers import generation_settings, read_protocol
from csr_vlm.evaluation.judge import Judge
from csr_vlm.evaluation.pope import read_answers, read_rows
from csr_vlm.evaluation.statistics import Metric, Tally, pooled

PROTOCOL = "csr-hallucination-1"
"""Name of the protocols of this version; changes with any rule that changes a number."""
YES_OR_NO_TOKENS = 16
CHARS_OF_A_TOKEN = 6
"""Upper estimate of the characters in a generated token, for the cost of a judge."""


@dataclass(frozen=True)
class SuitePart:
    """Hold prompts of a benchmark that are answered under one token limit and stored in one file."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    """Rows of a prompt file: question_id (or id), image, text."""
    images: Path
    """Folder that the rows' images are relative to."""
    max_new_tokens: int


@dataclass(frozen=True)
class AnswerFile:
    """Hold the answers to a part of a benchmark."""

    path: Path
    prompts: Path
    """The prompt file that was answered."""

    @property
    def by_id(self) -> dict[str, str]:
        """Return the answers by question id."""
        return read_answers(self.path)


@dataclass(frozen=True)
class Scoring:
    """Hold what scoring a benchmark may need besides the answers."""

    folder: Path
    """Folder for files that a scoring script reads."""
    judge: Judge | None = None
    tick: Callable[[int], object] = field(default=int)
    """Is called with the number of answers judged."""


class Suite(ABC):
    """Represent one benchmark."""

    name: ClassVar[str]
    judged: ClassVar[bool] = False
    """Whether a language model scores the answers."""

    @abstractmethod
    def parts(self) -> Sequence[SuitePart]:
        """Return the prompts.

        Raises:
            CsrError: A file is missing or not in the benchmark's format.
        """

    @abstractmethod
    def score(self, answers: Mapping[str, AnswerFile], scoring: Scoring) -> dict[str, Any]:
        """Score the answers of one policy, by the name of their part.

        Returns:
            An evaluation document: ``metrics``, ``protocol``, ``rows``; ``outcome`` for what is neither.
        """

    def request_chars(self) -> list[int]:
        """Return the most characters of each request to the judge; empty without a judge."""
        return []


def evaluation_document(
    suite: Suite,
    rows: Sequence[Mapping[str, Any]],
    protocol: Mapping[str, Any],
    answers: Iterable[AnswerFile],
    metrics: Mapping[str, Metric] | None = None,
    outcome: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build an evaluation document.

    Args:
        rows: Rows with ``id``, ``text`` and ``tallies``.
        metrics: By default the ratios of the rows' tallies.
    """
    found = pooled([row["tallies"] for row in rows]) if metrics is None else metrics
    generated = generation_settings([read_protocol(file.path) for file in answers])
    document: dict[str, Any] = {
        "metrics": {name: metric.dump() for name, metric in found.items()},
        "protocol": {"metric": suite.name, "suite": PROTOCOL, **protocol, **generated},
        "rows": [dict(row) for row in rows],
    }
    if outcome is not None:
        document["outcome"] = dict(outcome)
    return document


def judged_outcome(judge: Judge, values: Sequence[object | None], **further: Any) -> dict[str, Any]:
    """Return how judging went: how many answers have a judgment, and how many replies could not be read."""
    unread = sum(value is None for value in values)
    return {"judged": len(values) - unread, "unread": unread, "transcript": str(judge.transcript), **further}


def unread_tally(value: object | None) -> Tally:
    """Return what one reply adds to the share of replies that could not be read."""
    return int(value is None), 1


def required_file(folder: Path, names: Sequence[str], what: str) -> Path:
    """Return the first of the named files that a checkout has.

    Raises:
        CsrError: It has none.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise CsrError(f"{folder} has no {what}", f"expected one of: {', '.join(names)}")


def questions_in(file: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Read the rows of a question file, up to a limit.

    Raises:
        CsrError: It cannot be read, or has none.
    """
    rows = read_rows(file)[:limit]
    if not rows:
        raise CsrError(f"{file} has no questions", "use the file of the benchmark's repository")
    return rows


def constant_text(script: Path, name: str) -> str:
    """Return the text that a Python script assigns to a name at its top level; the script is parsed, not run.

    Raises:
        CsrError: The script assigns no literal text to the name.
    """
    try:
        tree = ast.parse(script.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        raise CsrError(f"{script} cannot be parsed: {error}", "check the checkout") from None
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            return node.value.value
    raise CsrError(f"{script} assigns no text to {name}", "the benchmark's format has changed; use the original script")
