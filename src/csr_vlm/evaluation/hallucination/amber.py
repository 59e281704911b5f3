"""Score AMBER with its own script, run unchanged from the user's checkout (Wang et al. 2023, arXiv 2311.07397).

The script decides with spaCy's word vectors whether a noun is an annotated object, so no word list of ours
could give its numbers. It runs in a process of its own, in the checkout, and its output is read back. It
knows the answers Yes and No only: the first word of an answer decides which of them it gets; an answer that
begins with neither is passed on as it is, scores nothing there, and is counted as unread.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from csr_vlm.core.errors import CsrError
from csr_vlm.core.secrets import is_secret_name, redact
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
from csr_vlm.evaluation.pope import parse_strict, read_rows
from csr_vlm.evaluation.statistics import Metric, Tally, pooled
from csr_vlm.store import files

_TOKENS = 512
_GENERATIVE = ("CHAIR", "Cover", "Hal", "Cog")
_DISCRIMINATIVE = ("Accuracy", "Precision", "Recall", "F1")
_SECTIONS = {
    "gen": "", "desc": "", "disc": "", "exs": "_existence", "exi": "_existence", "att": "_attribute",
    "sta": "_state", "num": "_number", "act": "_action", "rel": "_relation",
}  # fmt: skip
"""Beginning of a heading in the script's output, some of which are misspelled, to the end of our names."""
_LINE = re.compile(r"^\s*([A-Za-z][A-Za-z0-9 ]*):\s*(\d+(?:\.\d+)?)?\s*$")
_ROUNDED = 0.0005 + 1e-9
"""Half a unit of the last digit that the script prints, as a fraction."""


class AmberSuite(Suite):
    """Represent AMBER, both its generative and its discriminative task.

    Args:
        folder: Checkout with ``inference.py`` and ``data``.
        images: Folder of the pictures (default: ``image`` in the checkout).
        python: Interpreter that has the script's requirements (default: the one that runs csr).
        limit: Number of questions of every kind.
    """

    name = "amber"

    def __init__(
        self, folder: Path, images: Path | None = None, python: Path | None = None, limit: int | None = None
    ) -> None:
        self._folder = folder
        self._script = required_file(folder, ["inference.py"], "script")
        self._queries = required_file(folder, ["data/query/query_all.json"], "queries")
        self._annotations = required_file(folder, ["data/annotations.json"], "annotations")
        self._images = images or folder / "image"
        self._python = python or Path(sys.executable)
        annotated = {row.get("id"): row for row in read_rows(self._annotations)}
        self._rows = questions_in(self._queries)
        for number, row in enumerate(self._rows, start=1):
            if not isinstance(row.get("query"), str) or not isinstance(row.get("id"), int):
                raise CsrError(f"{self._queries}, query {number} lacks id or query", "check the checkout")
            if row["id"] not in annotated:
                raise CsrError(f"{self._annotations} has no id {row['id']}", "check the checkout")
        self._types = {row["id"]: str(annotated[row["id"]].get("type")) for row in self._rows}
        self._truth = {row["id"]: annotated[row["id"]].get("truth") for row in self._rows}
        if limit is not None:
            ordered = sorted(self._rows, key=lambda row: self._types[row["id"]])
            kinds = groupby(ordered, key=lambda row: self._types[row["id"]])
            self._rows = sorted((row for _, kind in kinds for row in list(kind)[:limit]), key=lambda row: row["id"])

    def parts(self) -> Sequence[SuitePart]:
        return [
            SuitePart(
                name,
                [
                    {"question_id": str(row["id"]), "image": row.get("image"), "text": row["query"]}
                    for row in self._rows
                    if self._describes(row) is (name == "generative")
                ],
                self._images,
                tokens,
            )
            for name, tokens in (("generative", _TOKENS), ("discriminative", YES_OR_NO_TOKENS))
        ]

    def _describes(self, row: Mapping[str, Any]) -> bool:
        return self._types[row["id"]] == "generative"

    def score(self, answers: Mapping[str, AnswerFile], scoring: Scoring) -> dict[str, Any]:
        texts = {**answers["generative"].by_id, **answers["discriminative"].by_id}
        rows, responses = [], []
        for row in self._rows:
            text, tallies = texts[str(row["id"])], {}
            response = text
            if not self._describes(row):
                answer = parse_strict(text)
                response = text if answer is None else "Yes" if answer else "No"
                tallies = self._tallies(response, answer, self._truth[row["id"]])
            responses.append({"id": row["id"], "response": response})
            rows.append({"id": str(row["id"]), "text": text, "tallies": tallies})
        inference = scoring.folder / "amber-inference.json"
        files.write_json(inference, responses)
        metrics = self._with_intervals(read_output(self._run(inference)), rows)
        protocol = {
            "script": files.sha256_of(self._script),
            "annotations": files.sha256_of(self._annotations),
            "queries": {"sha256": files.sha256_of(self._queries), "n": len(self._rows)},
            "parser": "the first word of an answer, as Yes or No",
            "interval": "accuracy: 95 % over questions; others: none, the script gives sums only",
        }
        return evaluation_document(self, rows, protocol, answers.values(), metrics)

    def _tallies(self, response: str, answer: bool | None, truth: object) -> dict[str, Tally]:
        right = response == ("Yes" if truth == "yes" else "No")
        return {"amber_accuracy": (int(right), 1), "amber_unread": (int(answer is None), 1)}

    def _with_intervals(self, printed: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> dict[str, Metric]:
        """Attach an interval to the accuracy, whose questions are known, and check it against the script's.

        Raises:
            CsrError: The script's accuracy is not that of the answers that it was given.
        """
        own = pooled([row["tallies"] for row in rows if row["tallies"]])
        n = {True: sum(map(self._describes, self._rows))}
        n[False] = len(self._rows) - n[True]
        generative = {f"amber_{name.lower()}" for name in _GENERATIVE}
        metrics = {key: Metric(value, None, None, n[key in generative]) for key, value in printed.items()}
        counted = own["amber_accuracy"].value
        if counted is None or abs(counted - printed["amber_accuracy"]) > _ROUNDED:
            raise CsrError(
                f"AMBER's script prints an accuracy of {printed['amber_accuracy']:.3f} for answers of which "
                f"{counted or 0:.4f} are right",
                "check that the checkout is unchanged",
            )
        return metrics | own

    def _run(self, inference: Path) -> str:
        """Run the script and return its output.

        Raises:
            CsrError: It cannot be started, or fails.
        """
        command = [str(self._python), self._script.name, "--inference_data", str(inference.resolve())]
        environment = {name: value for name, value in os.environ.items() if not is_secret_name(name)}
        try:
            done = subprocess.run(
                [*command, "--evaluation_type", "a"],
                cwd=self._folder, env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
        except OSError as error:
            raise CsrError(f"{self._python} cannot be started: {error}", "check --amber-python") from None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise CsrError(
                f"AMBER's script failed: {redact(last)[:300]}",
                "install its requirements (spacy, en_core_web_lg, nltk data) and name their interpreter with "
                "--amber-python; the answers are kept",
            )
        return done.stdout


def read_output(output: str) -> dict[str, float]:
    """Read the script's output: metrics by our names, as fractions.

    Raises:
        CsrError: A number of the two tasks is missing.
    """
    found: dict[str, float] = {}
    suffix: str | None = None
    for line in output.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        name, value = match[1].strip(), match[2]
        if value is None:
            suffix = next((end for start, end in _SECTIONS.items() if name.lower().startswith(start)), None)
        elif suffix is not None and name in (*_GENERATIVE, *_DISCRIMINATIVE):
            found[f"amber_{name.lower()}{suffix}"] = float(value) / 100
    missing = [name for name in (*_GENERATIVE, *_DISCRIMINATIVE) if f"amber_{name.lower()}" not in found]
    if missing:
        raise CsrError(f"AMBER's script printed no {', '.join(missing)}", "check that the checkout is unchanged")
    return found
