"""Compute POPE: yes-or-no questions about objects (Li et al. 2023, arXiv 2305.10355).

Yes is the positive class: accuracy = (TP + TN) / n, precision = TP / (TP + FP),
recall = TP / (TP + FN), F1 = 2 precision recall / (precision + recall),
yes ratio = answers parsed as yes / n.

The results depend on how answers are parsed, so three parsers are reported side by side:

``official``  The parser of POPE and LLaVA. It takes the text before the first ".", deletes
              commas and splits at spaces; the answer is no if a piece is exactly No, no or
              not, and yes otherwise, also for NO, No!, isn't and an empty answer.
``strict``    The first word must be yes or no, in any case; any other answer is unread.
``lenient``   The first yes or no anywhere decides; without one, a negation means no; an
              answer with neither is unread.

An unread answer is wrong, and counts neither as yes nor as no.
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
from csr_vlm.data.rows import BadRow, first_field, is_present, row_id_of, row_image, row_text
from csr_vlm.evaluation.statistics import Metric, Tally, pooled, share_of_sums
from csr_vlm.evaluation.words import letters
from csr_vlm.store.files import digest, open_regular

SETTINGS = ("random", "popular", "adversarial")
_NEGATIONS = frozenset("not none nothing never neither nor cannot without nope".split())
_NEGATED = re.compile(r"n['’]t\b", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """Represent a yes-or-no question about an image."""

    question_id: str
    image: str
    text: str
    label: bool
    """Whether the right answer is yes."""


@dataclass(frozen=True)
class QuestionFile:
    """Hold the questions of one setting."""

    setting: str
    """random, popular or adversarial; the stem of the file name where it contains none of these."""
    name: str
    """Description of the file; names the published file with the same questions, if any."""
    questions: tuple[Question, ...]
    sha256: str
    """Digest of the questions."""


def parse_official(answer: str) -> bool:
    """Parse an answer as POPE's own script does."""
    pieces = answer.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(pieces)


def parse_strict(answer: str) -> bool | None:
    """Parse the first word, which must be yes or no; return None otherwise."""
    return {"yes": True, "no": False}.get(next(iter(letters(answer)), ""))


def parse_lenient(answer: str) -> bool | None:
    """Parse the first yes or no anywhere, or else a negation; return None where there is neither."""
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
    """Compute POPE's metrics of parsed answers.

    Args:
        labels: Whether the right answer is yes, per question.
        answers: Whether the parsed answer is yes, per question; None for an unread answer.

    Returns:
        ``TP``, ``FP``, ``TN``, ``FN``, ``unread``, ``n``; ``accuracy``, ``precision``,
        ``recall``, ``f1``, ``yes_ratio``, each None where its denominator is 0, with the reason
        in ``undefined``; ``intervals``, 95 % intervals over questions.
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
    metrics = {name: share_of_sums(columns, _rate(name)) for name in _RATES}
    return {
        **{name: int(sum(cells[name])) for name in ("n", "TP", "FP", "TN", "FN", "unread")},
        **{name: metric.value for name, metric in metrics.items()},
        "intervals": {name: [metric.low, metric.high] for name, metric in metrics.items()},
        "undefined": {name: _UNDEFINED_REASONS[name] for name, metric in metrics.items() if metric.value is None},
    }


def _rate(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from the sums of the columns in :func:`score` to a rate."""

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
_UNDEFINED_REASONS = {
    "accuracy": "there are no questions",
    "precision": "no answer was parsed as yes",
    "recall": "no question has the label yes",
    "f1": "precision or recall is undefined, or both are 0",
    "yes_ratio": "there are no questions",
}


def evaluate(files: Sequence[tuple[QuestionFile, Mapping[str, str]]]) -> dict[str, Any]:
    """Score the answers to one or more question files under every parser.

    Args:
        files: Question files, each with a mapping from question id to answer.

    Returns:
        Parser name to ``settings`` (setting to :func:`score`) and ``mean`` (over the settings;
        None where the rate of a setting is None).
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


def evaluation_document(
    files: Sequence[tuple[QuestionFile, Mapping[str, str]]], protocol: Mapping[str, Any]
) -> dict[str, Any]:
    """Score answers with the official parser, in the form that runs store.

    Returns:
        ``metrics``, ``protocol`` and ``rows`` with tallies. For a single setting the metrics are
        the rates. For several settings they are ``RATE_SETTING`` and ``mean_RATE``; the mean is
        not a ratio of sums over questions, so it has no interval and no tallies.
    """
    several = len(files) > 1
    rows: list[dict[str, Any]] = []
    row_tallies: list[dict[str, Tally]] = []
    for questions, answers in files:
        suffix = f"_{questions.setting}" if several else ""
        for question in questions.questions:
            text = answers[question.question_id]
            rates = tallies(question.label, parse_official(text))
            row_tallies.append({f"{name}{suffix}": tally for name, tally in rates.items()})
            rows.append({"id": f"{questions.setting}/{question.question_id}", "text": text, "tallies": row_tallies[-1]})
    metrics = pooled(row_tallies)
    if several:
        for name in _RATES:
            values = [metrics[f"{name}_{questions.setting}"].value for questions, _ in files]
            metrics[f"mean_{name}"] = Metric(_mean(values), None, None, len(rows))
    return {
        "metrics": {name: metric.dump() for name, metric in metrics.items()},
        "protocol": {**protocol, "parser": "official"},
        "rows": rows,
    }


def protocol(files: Sequence[QuestionFile]) -> dict[str, Any]:
    """Return which questions POPE's numbers are about."""
    return {
        "metric": "POPE",
        "questions": [
            {"setting": file.setting, "file": file.name, "n": len(file.questions), "sha256": file.sha256}
            for file in files
        ],
        "interval": "95 % over questions",
    }


def tallies(label: bool, answer: bool | None) -> dict[str, Tally]:
    """Return what one answer adds to the numerator and the denominator of each rate.

    F1 is such a ratio too: 2 TP / (answered yes + labeled yes). It is 0 where TP is 0.
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
    """Return the mean; None where a value is None or there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _means(scores: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    return {name: _mean([rates[name] for rates in scores]) for name in _RATES}


def read_questions(path: Path, setting: str | None = None) -> QuestionFile:
    """Read a POPE question file: JSON lines with question_id, image, text, label.

    Args:
        setting: Name of the setting (default: the one that the file's name contains, or else its stem).

    Raises:
        CsrError: A line is not a valid question, or an id occurs twice.
    """
    questions = tuple(_question(row, f"{path}, row {number}") for number, row in enumerate(read_rows(path), start=1))
    if not questions:
        raise CsrError(f"{path} contains no questions", "pass a POPE question file")
    ids = [question.question_id for question in questions]
    if len(set(ids)) < len(ids):
        raise CsrError(f"{path}: a question_id occurs twice", "number the questions of a file uniquely")
    content = digest([[q.question_id, q.image, q.text, q.label] for q in questions])
    setting = setting or next((name for name in SETTINGS if name in path.stem.lower()), path.stem)
    return QuestionFile(setting, _describe_file(content, setting, len(questions)), questions, content)


def _question(row: Mapping[str, Any], position: str) -> Question:
    """Read a question; lmms-eval's label is called answer.

    Raises:
        CsrError: Its id, text or label is missing.
    """
    hint = f"write question_id, image, text and label in each line; the row has {', '.join(map(str, row))[:200]}"
    label = _LABELS.get(str(first_field(row, ("label", "answer"))).strip().lower())
    if not is_present(row.get("question_id")):
        raise CsrError(f"{position}: question_id is missing", hint)
    if label is None:
        raise CsrError(f"{position}: label is missing, or neither yes nor no", hint)
    try:
        question_id, text = row_id_of({"question_id": row["question_id"]}), row_text(row)
    except BadRow as error:
        raise CsrError(f"{position}: {error}", hint) from None
    if not text:
        raise CsrError(f"{position}: text is missing", hint)
    return Question(question_id, _image_name(row), text, label)


def _image_name(row: Mapping[str, Any]) -> str:
    """Return the image of a question as its row names it; empty where it comes as bytes or is missing."""
    try:
        name = row_image(row)
    except BadRow:
        return ""
    return name if isinstance(name, str) else ""


_LABELS = {"yes": True, "no": False}
_PUBLISHED = {
    "65285885ac87ee8c": "POPE on COCO val2014, random, 3,000 questions",
    "fa041884c3ada06b": "POPE on COCO val2014, popular, 3,000 questions",
    "9e7122e0c5ea8e88": "POPE on COCO val2014, adversarial, 3,000 questions",
}
"""Digest of the questions to the published file that contains them."""


def _describe_file(content: str, setting: str, count: int) -> str:
    """Return the name of the published file with these questions, or state that none is known."""
    if content in _PUBLISHED:
        return _PUBLISHED[content]
    if setting == "random" and count == 2910:
        return "random, 2,910 questions: as many as POPE's older file, which LLaVA-1.5's published number is based on"
    return f"{setting}, {count:,} questions: none of POPE's current files"


def read_answers(path: Path) -> dict[str, str]:
    """Read answers: JSON lines with question_id and answer (or text, LLaVA's name for it).

    Raises:
        CsrError: A line lacks one of these, or an id occurs twice.
    """
    answers: dict[str, str] = {}
    for number, row in enumerate(read_rows(path), start=1):
        answer = row.get("answer", row.get("text"))
        try:
            key = row_id_of({"question_id": row.get("question_id")})
        except BadRow:
            key = ""
        if not key or not isinstance(answer, str):
            raise CsrError(
                f"{path}, row {number}: question_id or answer is missing",
                'write rows such as {"question_id": 1, "answer": "Yes"}',
            )
        if key in answers:
            raise CsrError(f"{path}: question {key} is answered twice", "keep one answer per question")
        answers[key] = answer
    return answers


def match_answers(
    questions: Sequence[QuestionFile], answers: Sequence[Path]
) -> list[tuple[QuestionFile, Mapping[str, str]]]:
    """Match each question file with its answers.

    Args:
        answers: One file per question file, in the same order; or one file for all, if no
            question id occurs in two question files.

    Raises:
        CsrError: The number of files does not match, a question has no answer, or an answer
            has no question.
    """
    ids_by_file = [frozenset(question.question_id for question in file.questions) for file in questions]
    if len(answers) == 1:
        all_ids = frozenset[str]().union(*ids_by_file)
        if sum(map(len, ids_by_file)) > len(all_ids):
            raise CsrError(
                "the question files share question ids, so a single answer file is ambiguous",
                "pass one --answers per --questions, in the same order",
            )
        all_answers = read_answers(answers[0])
        _require_same_ids(all_ids, all_answers, answers[0])
        matched = [{key: text for key, text in all_answers.items() if key in ids} for ids in ids_by_file]
    elif len(answers) == len(questions):
        matched = [read_answers(path) for path in answers]
        for ids, file_answers, path in zip(ids_by_file, matched, answers, strict=True):
            _require_same_ids(ids, file_answers, path)
    else:
        raise CsrError(
            f"got {len(questions)} question files but {len(answers)} answer files",
            "pass one --answers per --questions, in the same order",
        )
    return list(zip(questions, matched, strict=True))


def _require_same_ids(ids: Set[str], answers: Mapping[str, str], path: Path) -> None:
    missing, unknown = sorted(ids - answers.keys()), sorted(answers.keys() - ids)
    if missing or unknown:
        raise CsrError(
            f"{path}: {len(missing)} questions without an answer, {len(unknown)} answers to other questions",
            f"see question {(missing or unknown)[0]}",
        )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines, or a JSON array, of objects.

    Raises:
        CsrError: The file cannot be read, or a row is not a JSON object.
    """
    try:
        with open_regular(path) as file:
            text = file.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CsrError(f"{path} cannot be read: {error}", "pass a file of JSON lines in UTF-8") from None
    try:
        if text.lstrip().startswith("["):
            rows = [(number, row) for number, row in enumerate(json.loads(text), start=1)]
        else:
            lines = enumerate(text.split("\n"), start=1)
            rows = [(number, json.loads(line)) for number, line in lines if line.strip()]
    except (ValueError, RecursionError) as error:
        raise CsrError(f"{path} is not in JSON Lines format: {error}", "write one JSON object per line") from None
    for number, row in rows:
        if not isinstance(row, dict):
            raise CsrError(f"{path}, row {number} is not a JSON object", "write one JSON object per line")
    return [row for _, row in rows]
