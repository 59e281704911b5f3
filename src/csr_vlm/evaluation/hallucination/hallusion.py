"""Score HallusionBench by its rule for yes and no (Guan et al. 2024, arXiv 2310.14566).

    aAcc = right answers / questions
    fAcc = figures with right answers to all their questions / figures
    qAcc = questions that are answered right on all figures that they are asked about / questions

A policy takes one image per prompt, so the questions without one (``visual_input`` 0) are left out, as
in VLMEvalKit and in the image split of lmms-eval. Of the published file that leaves 951 questions, 346
figures and 455 question texts. The paper's table has GPT-4 read the answers, and includes those questions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.hallucination.suite import (
    YES_OR_NO_TOKENS,
    AnswerFile,
    Scoring,
    Suite,
    SuitePart,
    evaluation_document,
    questions_in,
    required_file,
)
from csr_vlm.evaluation.words import letters
from csr_vlm.store.files import sha256_of

INSTRUCTION = " Please answer yes or no."
_FIELDS = ("category", "subcategory", "set_id", "figure_id", "question_id", "question", "gt_answer", "visual_input")


def read_yes_or_no(answer: str) -> bool | None:
    """Read an answer that has the word yes or the word no, but not both; None for any other."""
    found = {"yes", "no"} & set(letters(answer))
    return found == {"yes"} if len(found) == 1 else None


class HallusionSuite(Suite):
    """Represent HallusionBench.

    Args:
        folder: Checkout with ``HallusionBench.json`` and the figures in ``hallusion_bench``.
    """

    name = "hallusion"

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self._folder = folder
        self._file = required_file(folder, ["HallusionBench.json"], "questions")
        rows = questions_in(self._file)
        for number, row in enumerate(rows, start=1):
            missing = [name for name in _FIELDS if name not in row]
            if missing or str(row["gt_answer"]) not in {"0", "1"}:
                raise CsrError(
                    f"{self._file}, question {number}: {', '.join(missing) or 'gt_answer'} is missing or unusable",
                    "use the file of the benchmark's repository",
                )
        self._questions = [row for row in rows if str(row["visual_input"]) != "0"][:limit]
        self._left_out = sum(str(row["visual_input"]) == "0" for row in rows)

    def parts(self) -> Sequence[SuitePart]:
        rows = [
            {"question_id": _key(row), "image": row.get("filename"), "text": f"{row['question']}{INSTRUCTION}"}
            for row in self._questions
        ]
        return [SuitePart("questions", rows, self._folder, YES_OR_NO_TOKENS)]

    def score(self, answers: Mapping[str, AnswerFile], scoring: Scoring) -> dict[str, Any]:
        texts = answers["questions"].by_id
        rows: list[dict[str, Any]] = []
        figures: dict[str, list[bool]] = defaultdict(list)
        questions: dict[str, list[bool]] = defaultdict(list)
        for row in self._questions:
            text = texts[_key(row)]
            answer = read_yes_or_no(text)
            right = answer is (str(row["gt_answer"]) == "1")
            figures[_key(row, "figure_id")].append(right)
            questions[_key(row, "question_id")].append(right)
            tallies = {"hallusion_a_acc": (int(right), 1), "hallusion_unread": (int(answer is None), 1)}
            rows.append({"id": _key(row), "text": text, "tallies": tallies})
        for kind, key, groups in (("figure", "hallusion_f_acc", figures), ("question", "hallusion_q_acc", questions)):
            rows += [
                {"id": f"{kind}/{name}", "text": "", "tallies": {key: (int(all(right)), 1)}}
                for name, right in groups.items()
            ]
        protocol = {
            "questions": {"file": self._file.name, "sha256": sha256_of(self._file), "n": len(self._questions)},
            "left_out": f"{self._left_out} questions without an image",
            "parser": "yes or no as a word, and not both; anything else is wrong and counted as unread",
            "interval": "95 % over questions, figures and question texts",
        }
        return evaluation_document(self, rows, protocol, answers.values())


def _key(row: Mapping[str, Any], *fields: str) -> str:
    """Return the id of a question, or of the figure or question text that it belongs to."""
    names = ("category", "subcategory", "set_id", *(fields or ("figure_id", "question_id")))
    return "_".join(str(row[name]) for name in names)
