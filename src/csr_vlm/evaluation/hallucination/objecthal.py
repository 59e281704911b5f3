"""Score Object HalBench: a judge lists the objects of a description, which are compared with COCO (arXiv 2312.00849).

    response = descriptions that name an absent object / descriptions that name an object of COCO
    mention  = absent objects named / objects named              each word once a description
    recall   = objects of the images that their descriptions name / objects of the images

The questions, the synonyms and the judge's prompt come from a checkout of RLAIF-V. Three things differ from
its script, and the protocol says so: the judge is the user's, at temperature 0 instead of 0.2; objects are found
in the judge's phrases, and in COCO's captions, by CHAIR's word rule instead of spaCy's and WordNet's lemmas; a
reply that is no JSON list is asked for once more and then counted as unread, instead of a hundred times.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.annotations import Annotations, ground_truth, read_annotations
from csr_vlm.evaluation.chair import ObjectReader
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
from csr_vlm.evaluation.objects import ObjectTable
from csr_vlm.evaluation.statistics import Tally
from csr_vlm.evaluation.words import word_rule
from csr_vlm.store.files import digest, sha256_of

_TOKENS = 1024
_SHORT_WORDS = 3
"""The script does not ask the judge about an answer of so few words: it names nothing."""


def read_object_list(reply: str) -> tuple[str, ...] | None:
    """Read a JSON list of texts: the whole reply, or its last line; None for anything else."""
    for text in (reply, reply.strip().rpartition("\n")[2]):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, list) and all(isinstance(item, str) for item in found):
            return tuple(found)
    return None


class ObjectHalSuite(Suite):
    """Represent Object HalBench.

    Args:
        folder: Checkout of RLAIF-V, for its folder ``eval``.
        annotations: Folder with COCO's instances and captions of both splits.
        images: Folder of COCO's images, for questions whose picture the file does not contain.
    """

    name = "objecthal"
    judged = True

    def __init__(self, folder: Path, annotations: Path, images: Path | None, limit: int | None = None) -> None:
        home = folder / "eval"
        self._file = required_file(home, ["data/obj_halbench_300_with_image.jsonl"], "questions of Object HalBench")
        self._prompt = constant_text(required_file(home, ["eval_gpt_obj_halbench.py"], "script"), "prompt_template")
        if any(gap not in self._prompt for gap in ("{question}", "{answer}")):
            raise CsrError(f"the judge's prompt in {folder} has no place for question and answer", "check the checkout")
        table = ObjectTable.read(required_file(home, ["data/synonyms_refine.txt"], "synonyms"))
        pairs = {word: word for word in table.objects if word.count(" ") == 1}
        self._reader = ObjectReader(word_rule("pattern"), ObjectTable(table.objects, {**pairs, **table.pairs}, True))
        self._images = images if images is not None else self._file.parent
        self._questions = questions_in(self._file, limit)
        self._coco: Annotations = read_annotations(annotations)
        self._ids = [self._coco.find(_image_id(row, self._file)) for row in self._questions]
        if None in self._ids:
            row = self._questions[self._ids.index(None)]
            raise CsrError(f"{annotations} lacks image {row['image_id']}", "give the annotations of COCO 2014")

    def parts(self) -> Sequence[SuitePart]:
        rows = [
            {"question_id": str(number), "image": row.get("image") or _file_name(row), "text": row["question"]}
            for number, row in enumerate(self._questions)
        ]
        return [SuitePart("questions", rows, self._images, _TOKENS)]

    def request_chars(self) -> list[int]:
        return [len(self._request(row, "")) + _TOKENS * CHARS_OF_A_TOKEN for row in self._questions]

    def _request(self, row: Mapping[str, Any], answer: str) -> str:
        before, _, after = self._prompt.replace("{question}", str(row["question"]), 1).partition("{answer}")
        return f"{before}{answer}{after}"

    def score(self, answers: Mapping[str, AnswerFile], scoring: Scoring) -> dict[str, Any]:
        assert scoring.judge is not None, "a judged suite is scored with a judge"
        texts = answers["questions"].by_id
        asked = [number for number in range(len(self._questions)) if len(texts[str(number)].split()) > _SHORT_WORDS]
        requests = [self._request(self._questions[number], texts[str(number)]) for number in asked]
        judgments = dict(zip(asked, scoring.judge.ask(requests, read_object_list, scoring.tick), strict=True))
        truth = ground_truth(self._coco, {key for key in self._ids if key is not None}, self._reader)
        rows = []
        for number, image_id in enumerate(self._ids):
            judgment = judgments.get(number) or Judgment((), "", "")
            assert image_id is not None, "checked when the questions were read"
            found = self._words(judgment.value or ())
            tallies = self._tallies(judgment, found, truth[image_id])
            rows.append(
                {
                    "id": str(number),
                    "text": texts[str(number)],
                    "image_id": image_id,
                    "objects": found,
                    "reply": judgment.reply,
                    "tallies": tallies,
                }
            )
        protocol = {
            "questions": {"file": self._file.name, "sha256": sha256_of(self._file), "n": len(self._questions)},
            "annotations": dict(self._coco.sources),
            "synonyms": self._reader.table.sha256,
            "judge": scoring.judge.protocol(list(judgments.values())),
            "judge_prompt": digest(self._prompt),
            "words": "CHAIR's pattern rule; the published script uses lemmas of spaCy en_core_web_trf",
            "parser": "a JSON list; other replies are left out and counted as unread",
            "interval": "95 % over descriptions",
        }
        values = [judgment.value for judgment in judgments.values()]
        outcome = judged_outcome(scoring.judge, values, short=len(rows) - len(asked))
        return evaluation_document(self, rows, protocol, answers.values(), outcome=outcome)

    def _words(self, phrases: Sequence[str]) -> dict[str, str]:
        """Return the words in the judge's phrases that name objects of COCO, each once, and the objects."""
        mentions = [self._reader.read(phrase) for phrase in phrases]
        return {word: name for found in mentions for word, name in zip(found.words, found.objects, strict=True)}

    def _tallies(
        self, judgment: Judgment[tuple[str, ...]], words: Mapping[str, str], truth: frozenset[str]
    ) -> dict[str, Tally]:
        tallies: dict[str, Tally] = {"objecthal_unread": unread_tally(judgment.value)}
        if judgment.value is not None:
            absent = sum(name not in truth for name in words.values())
            tallies["objecthal_response"] = (int(absent > 0), int(bool(words)))
            tallies["objecthal_mention"] = (absent, len(words))
            tallies["objecthal_recall"] = (len(truth & set(words.values())), len(truth))
        return tallies


def _image_id(row: Mapping[str, Any], file: Path) -> int:
    """Return COCO's number of a question's image.

    Raises:
        CsrError: The row lacks it, or its question.
    """
    number = str(row.get("image_id", ""))
    if not number.isdecimal() or not isinstance(row.get("question"), str):
        raise CsrError(f"{file}: a question lacks question or image_id", "use the file of the benchmark's repository")
    return int(number)


def _file_name(row: Mapping[str, Any]) -> str:
    return f"COCO_val2014_{int(row['image_id']):012d}.jpg"
