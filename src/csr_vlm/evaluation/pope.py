"""POPE: yes-or-no questions about objects (Li et al. 2023, arXiv 2305.10355).

Positive is yes: accuracy = (TP + TN) / n, precision = TP / (TP + FP),
recall = TP / (TP + FN), F1 = 2 precision recall / (precision + recall),
yes ratio = answers read as yes / n.

How an answer is read decides the numbers, so three parsers stand side by side:

``official``  POPE's and LLaVA's own. Of the text before the first "." it deletes commas
              and splits at blanks: no, if a piece is exactly No, no or not; yes otherwise,
              also for NO, No!, isn't, and an empty answer.
``strict``    The first word must be yes or no, in any case; anything else is unread.
``lenient``   The first yes or no anywhere decides; without one, a negation means no; an
              answer with neither is unread.

An unread answer is wrong, and neither a yes nor a no.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.statistics import Metric, Tally, bootstrap, pooled
from csr_vlm.evaluation.words import letters
from csr_vlm.store.files import digest

SETTINGS = ("random", "popular", "adversarial")
_NEGATIONS = frozenset("not none nothing never neither nor cannot without nope".split())
_NEGATED = re.compile(r"n['’]t\b", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    question_id: str
    image: str
    text: str
    label: bool


@dataclass(frozen=True)
class QuestionFile:
    """The questions of one setting."""

    setting: str
    name: str
    """Which published file it is, where it is one."""
    questions: tuple[Question, ...]
    sha256: str


def parse_official(answer: str) -> bool:
    """Read an answer as POPE's own script does."""
    pieces = answer.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(pieces)


def parse_strict(answer: str) -> bool | None:
    """Read the first word, which must be yes or no."""
    return {"yes": True, "no": False}.get(next(iter(letters(answer)), ""))


def parse_lenient(answer: str) -> bool | None:
    """Read the first yes or no anywhere, or else a negation."""
    words = letters(answer)
    for word in words:
        if word in {"yes", "no"}:
            return word == "yes"
    return False if _NEGATIONS & set(words) or _NEGATED.search(answer) else None


PARSERS: Mapping[str, Callable[[str], bool | None]] = {
    "official": parse_official,
    "strict": parse_strict,
    "lenient": parse_lenient,
}


def score(labels: Sequence[bool], answers: Sequence[bool | None]) -> dict[str, Any]:
    """Compute POPE's metrics of some answers.

    Returns:
        ``TP``, ``FP``, ``TN``, ``FN``, ``unread``, ``n``; ``accuracy``, ``precision``,
        ``recall``, ``f1``, ``yes_ratio``, None where a denominator is 0, with the reason in
        ``undefined``; ``intervals``, 95 % bootstrap over questions.
    """
    pairs = list(zip(labels, answers, strict=True))
    cells = {
        "TP": [float(label and answer is True) for label, answer in pairs],
        "FP": [float(not label and answer is True) for label, answer in pairs],
        "TN": [float(not label and answer is False) for label, answer in pairs],
        "FN": [float(label and answer is False) for label, answer in pairs],
        "unread": [float(answer is None) for _, answer in pairs],
        "positive": [float(label) for label in labels],
        "n": [1.0] * len(pairs),
    }
    columns = list(cells.values())
    found = {name: bootstrap(columns, _rate(name)) for name in _RATES}
    return {
        **{name: int(sum(cells[name])) for name in ("n", "TP", "FP", "TN", "FN", "unread")},
        **{name: metric.value for name, metric in found.items()},
        "intervals": {name: [metric.low, metric.high] for name, metric in found.items()},
        "undefined": {name: _WHY_UNDEFINED[name] for name, metric in found.items() if metric.value is None},
    }


def _rate(name: str) -> Callable[[np.ndarray], np.ndarray]:
    def rate(sums: np.ndarray) -> np.ndarray:
        tp, fp, tn, _, _, positive, n = sums
        with np.errstate(divide="ignore", invalid="ignore"):
            precision, recall = tp / (tp + fp), tp / positive
            values: dict[str, np.ndarray] = {
                "accuracy": (tp + tn) / n,
                "precision": precision,
                "recall": recall,
                "f1": 2 * precision * recall / (precision + recall),
                "yes_ratio": (tp + fp) / n,
            }
        return values[name]

    return rate


_RATES = ("accuracy", "precision", "recall", "f1", "yes_ratio")
_WHY_UNDEFINED = {
    "accuracy": "there is no question",
    "precision": "no answer was read as yes",
    "recall": "no question has the label yes",
    "f1": "precision or recall is undefined, or both are 0",
    "yes_ratio": "there is no question",
}


def evaluate(files: Sequence[tuple[QuestionFile, Mapping[str, str]]]) -> dict[str, Any]:
    """Score the answers to some question files under every parser.

    Args:
        files: Questions, and question id to answer.

    Returns:
        Parser name to ``settings`` (setting to :func:`score`) and ``mean`` (of the settings,
        None where one of them is).
    """
    result: dict[str, Any] = {}
    for parser, parse in PARSERS.items():
        settings = {
            questions.setting: score(
                [question.label for question in questions.questions],
                [parse(answers[question.question_id]) for question in questions.questions],
            )
            for questions, answers in files
        }
        result[parser] = {"settings": settings, "mean": _means(list(settings.values()))}
    return result


def document(files: Sequence[tuple[QuestionFile, Mapping[str, str]]], protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Score answers by the official parser, in the form that runs store.

    Returns:
        ``metrics``, ``protocol`` and ``rows`` with tallies. Of one setting the metrics are the
        rates; of several, ``RATE_SETTING`` and ``mean_RATE``, which is no ratio of sums, so
        it has no interval and no tallies.
    """
    several = len(files) > 1
    rows: list[dict[str, Any]] = []
    shares: list[dict[str, Tally]] = []
    for questions, answers in files:
        suffix = f"_{questions.setting}" if several else ""
        for question in questions.questions:
            text = answers[question.question_id]
            found = tallies(question.label, parse_official(text))
            shares.append({f"{name}{suffix}": tally for name, tally in found.items()})
            rows.append({"id": f"{questions.setting}/{question.question_id}", "text": text, "tallies": shares[-1]})
    metrics = pooled(shares)
    if several:
        for name in _RATES:
            values = [metrics[f"{name}_{questions.setting}"].value for questions, _ in files]
            metrics[f"mean_{name}"] = Metric(_mean(values), None, None, len(rows))
    return {
        "metrics": {name: metric.dump() for name, metric in metrics.items()},
        "protocol": {**protocol, "parser": "official"},
        "rows": rows,
    }


def tallies(label: bool, answer: bool | None) -> dict[str, Tally]:
    """Return what one answer adds to the numerator and the denominator of each rate.

    F1 is one such ratio too, 2 TP / (answered yes + labelled yes), and 0 where nothing is right.
    """
    hit = int(label and answer is True)
    return {
        "accuracy": (int(answer is label), 1),
        "precision": (hit, int(answer is True)),
        "recall": (hit, int(label)),
        "f1": (2 * hit, int(answer is True) + int(label)),
        "yes_ratio": (int(answer is True), 1),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Average; None where a value is None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _means(scores: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    return {name: _mean([found[name] for found in scores]) for name in _RATES}


def read_questions(path: Path) -> QuestionFile:
    """Read a POPE question file: JSON lines with question_id, image, text, label.

    Raises:
        CsrError: A line is no such question, or an id comes twice.
    """
    rows = read_rows(path)
    try:
        questions = tuple(
            Question(
                question_id=str(row["question_id"]),
                image=str(row.get("image", "")),
                text=str(row["text"]),
                label=_LABELS[str(row["label"]).strip().lower()],
            )
            for row in rows
        )
    except KeyError as error:
        raise CsrError(
            f"{path}: a question has no {error}, or a label other than yes and no",
            "each line needs question_id, image, text, label",
        ) from None
    if not questions:
        raise CsrError(f"{path} holds no question", "give a POPE question file")
    ids = [question.question_id for question in questions]
    if len(set(ids)) < len(ids):
        raise CsrError(f"{path}: a question_id comes twice", "number the questions of a file uniquely")
    content = digest([[q.question_id, q.image, q.text, q.label] for q in questions])
    setting = next((name for name in SETTINGS if name in path.stem.lower()), path.stem)
    return QuestionFile(setting, _published(content, setting, len(questions)), questions, content)


_LABELS = {"yes": True, "no": False}
_PUBLISHED = {
    "65285885ac87ee8c": "POPE on COCO val2014, random, 3,000 questions",
    "fa041884c3ada06b": "POPE on COCO val2014, popular, 3,000 questions",
    "9e7122e0c5ea8e88": "POPE on COCO val2014, adversarial, 3,000 questions",
}
"""Digest of the questions to the published file they are."""


def _published(content: str, setting: str, count: int) -> str:
    """Name the published file that this is, or say that it is none known."""
    if content in _PUBLISHED:
        return _PUBLISHED[content]
    if setting == "random" and count == 2910:
        return "random, 2,910 questions: as many as POPE's older file, on which LLaVA-1.5's published number stands"
    return f"{setting}, {count:,} questions: none of POPE's present files"


def read_answers(path: Path) -> dict[str, str]:
    """Read answers: JSON lines with question_id and answer (or text, as LLaVA names it).

    Raises:
        CsrError: A line has neither, or an id comes twice.
    """
    answers: dict[str, str] = {}
    for row in read_rows(path):
        key, answer = str(row.get("question_id", "")), row.get("answer", row.get("text"))
        if not key or not isinstance(answer, str):
            raise CsrError(f"{path}: a line has no question_id or no answer", 'as {"question_id": 1, "answer": "Yes"}')
        if key in answers:
            raise CsrError(f"{path}: question {key} is answered twice", "keep one answer a question")
        answers[key] = answer
    return answers


def pair_up(questions: Sequence[QuestionFile], answers: Sequence[Path]) -> list[tuple[QuestionFile, Mapping[str, str]]]:
    """Give each question file its answers.

    Args:
        answers: One file for each question file, in the same order; or one file for all,
            if no question id is in two of them.

    Raises:
        CsrError: Another number of files, questions without an answer, or answers to
            questions that nobody asked.
    """
    asked = [frozenset(question.question_id for question in file.questions) for file in questions]
    if len(answers) == 1:
        if sum(map(len, asked)) > len(frozenset().union(*asked)):
            raise CsrError(
                "the question files number their questions alike, so one answer file cannot answer them all",
                "give one --answers for each --questions, in the same order",
            )
        everything = read_answers(answers[0])
        _refuse_others(frozenset().union(*asked), everything, answers[0])
        found = [{key: text for key, text in everything.items() if key in ids} for ids in asked]
    elif len(answers) == len(questions):
        found = [read_answers(path) for path in answers]
        for ids, mine, path in zip(asked, found, answers, strict=True):
            _refuse_others(ids, mine, path)
    else:
        raise CsrError(
            f"{len(questions)} question files and {len(answers)} answer files",
            "give one --answers for each --questions, in the same order",
        )
    return list(zip(questions, found, strict=True))


def _refuse_others(asked: Set[str], answers: Mapping[str, str], path: Path) -> None:
    missing, other = sorted(asked - answers.keys()), sorted(answers.keys() - asked)
    if missing or other:
        raise CsrError(
            f"{path}: {len(missing)} questions without an answer, {len(other)} answers to other questions",
            f"look at question {(missing or other)[0]}",
        )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines, or a JSON array, of objects.

    Raises:
        CsrError: The file cannot be read, or a line is no JSON object; it is named.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CsrError(f"{path} cannot be read: {error}", "give a file of JSON lines in UTF-8") from None
    try:
        if text.lstrip().startswith("["):
            rows = [(number, row) for number, row in enumerate(json.loads(text), start=1)]
        else:
            lines = enumerate(text.split("\n"), start=1)
            rows = [(number, json.loads(line)) for number, line in lines if line.strip()]
    except (ValueError, RecursionError) as error:
        raise CsrError(f"{path} is not JSON lines: {error}", "one JSON object a line") from None
    for number, row in rows:
        if not isinstance(row, dict):
            raise CsrError(f"{path}, row {number}: no JSON object", "one JSON object a line")
    return [row for _, row in rows]
