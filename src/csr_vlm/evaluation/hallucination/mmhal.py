"""Score MMHal-Bench: a judge rates each answer from 0 to 6 (Sun et al. 2023, arXiv 2309.14525).

    score = mean rating                 hallucination rate = answers rated below 3

The questions, the standard answers and the judge's prompt come from the user's checkout; its script is
parsed for the text of the prompt and never run. It rates a reply without exactly one rating 0. Here such a
reply is asked for once more, then left out of the score and counted; ``outcome`` also has the score with 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.hallucination.suite import (
    CHARS_OF_A_TOKEN,
    AnswerFile,
    Scoring,
    Suite,
    SuitePart,
    constant_text,
    evaluation_document,
    judged_outcome,
    questions_in,
    required_file,
    unread_tally,
)
from csr_vlm.evaluation.judge import Judgment
from csr_vlm.evaluation.statistics import Tally
from csr_vlm.store.files import digest, sha256_of

_TOKENS = 512
_HALLUCINATION_BELOW = 3
_RATINGS = range(7)
_QUESTIONS = (
    "response_template.json",
    "mmhal-bench_answer_template.json",
    "eval/data/mmhal-bench_answer_template.json",
)
_SCRIPTS = ("eval_gpt4.py", "eval_gpt_mmhal.py", "eval/eval_gpt_mmhal.py")
_GAPS = 4
"""Places of the prompt: image contents, question, standard answer, answer to rate."""


def read_rating(reply: str) -> int | None:
    """Read the rating of a reply, as the benchmark's script finds it; None without exactly one."""
    found = [rating for rating in _RATINGS if f"rating: {rating}" in reply.lower()]
    return found[0] if len(found) == 1 else None


class MMHalSuite(Suite):
    """Represent MMHal-Bench.

    Args:
        folder: Checkout with the questions, the judging script and the folder ``images``.
    """

    name = "mmhal"
    judged = True

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self._file = required_file(folder, _QUESTIONS, "questions of MMHal-Bench")
        self._pieces = constant_text(required_file(folder, _SCRIPTS, "judging script"), "template").split("{}")
        if len(self._pieces) != _GAPS + 1:
            raise CsrError(
                f"the judge's prompt in {folder} has {len(self._pieces) - 1} places to fill, not {_GAPS}",
                "use the script of the benchmark's repository",
            )
        self._images = folder / "images"
        self._questions = questions_in(self._file, limit)
        for number, row in enumerate(self._questions, start=1):
            texts = (row.get("question"), row.get("gt_answer"), row.get("question_type"))
            if not all(isinstance(text, str) for text in texts) or not isinstance(row.get("image_content"), list):
                raise CsrError(
                    f"{self._file}, question {number} lacks question, gt_answer, question_type or image_content",
                    "use the file of the benchmark's repository",
                )

    def parts(self) -> Sequence[SuitePart]:
        rows = [
            {"question_id": str(number), "image": self._picture(row), "text": row["question"]}
            for number, row in enumerate(self._questions)
        ]
        return [SuitePart("questions", rows, self._images, _TOKENS)]

    def _picture(self, row: Mapping[str, Any]) -> str:
        """Return the picture of a question: its Base64 text, or the name of a file in the folder of pictures.

        Raises:
            CsrError: The folder has no such file.
        """
        if isinstance(row.get("image"), str):
            return str(row["image"])
        address = PurePosixPath(urlsplit(str(row.get("image_src", ""))).path)
        names = [address.name, f"{row.get('image_id')}{address.suffix}", f"{row.get('image_id')}.jpg"]
        for name in names:
            if name and (self._images / name).is_file():
                return name
        raise CsrError(
            f"{self._images} has none of {', '.join(filter(None, names))}",
            "download the pictures of MMHal-Bench (image_src) into that folder",
        )

    def request_chars(self) -> list[int]:
        return [len(self._request(row, "")) + _TOKENS * CHARS_OF_A_TOKEN for row in self._questions]

    def _request(self, row: Mapping[str, Any], answer: str) -> str:
        filled = (", ".join(map(str, row["image_content"])), row["question"], row["gt_answer"], answer)
        return "".join(f"{piece}{text}" for piece, text in zip(self._pieces, (*filled, ""), strict=True))

    def score(self, answers: Mapping[str, AnswerFile], scoring: Scoring) -> dict[str, Any]:
        assert scoring.judge is not None, "a judged suite is scored with a judge"
        texts = answers["questions"].by_id
        requests = [self._request(row, texts[str(number)]) for number, row in enumerate(self._questions)]
        judgments = scoring.judge.ask(requests, read_rating, scoring.tick)
        rows = [
            {
                "id": str(number),
                "text": texts[str(number)],
                "question_type": row["question_type"],
                "reply": judgment.reply,
                "tallies": _tallies(judgment, row["question_type"]),
            }
            for number, (row, judgment) in enumerate(zip(self._questions, judgments, strict=True))
        ]
        ratings = [judgment.value for judgment in judgments]
        as_zero = sum(rating or 0 for rating in ratings) / len(ratings)
        protocol = {
            "questions": {"file": self._file.name, "sha256": sha256_of(self._file), "n": len(self._questions)},
            "judge": scoring.judge.protocol(judgments),
            "judge_prompt": digest(self._pieces),
            "parser": "exactly one rating; other replies are left out and counted as unread",
            "interval": "95 % over questions",
        }
        outcome = judged_outcome(scoring.judge, ratings, score_with_unread_as_zero=as_zero)
        return evaluation_document(self, rows, protocol, answers.values(), outcome=outcome)


def _tallies(judgment: Judgment[int], question_type: str) -> dict[str, Tally]:
    found: dict[str, Tally] = {"mmhal_unread": unread_tally(judgment.value)}
    if judgment.value is not None:
        found["mmhal_score"] = (judgment.value, 1)
        found["mmhal_rate"] = (int(judgment.value < _HALLUCINATION_BELOW), 1)
        found[f"mmhal_score_{question_type}"] = (judgment.value, 1)
    return found
