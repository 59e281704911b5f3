"""Test the readers on bad input: no traceback, no hang, no memory growth, a reason for every rejection.

``make test-faults`` reads 1,500 cases; the ordinary tests read a sample of them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.families.checkpoints import checkpoint
from tests.faults import badinput, fieldinput, reading
from tests.faults.case import Case, WrittenCase

FULL = os.environ.get("CSR_FAULTS") == "all"
NUMBER = 1000 if FULL else 150
NUMBER_OF_FIELD = 500 if FULL else 63
"""Number of cases of the kinds of tests/data/field; the kinds have a sum of weights of 63."""
SLOW = ("endless line", "endless JSON entry", "damaged model", "odd adapter", "damaged data set")
"""Kinds of cases that only the long test reads: they load models, or write hundreds of megabytes."""


def test_bad_input_is_counted_and_explained(tmp_path: Path) -> None:
    cases = list(badinput.cases(seed=0, number=NUMBER))
    if not FULL:
        cases = [case for case in cases if not case.name.startswith(SLOW)]
    results = reading.read_all(cases, tmp_path)
    print(json.dumps(results.summary(), indent=1))
    assert [vars(outcome) for outcome in results.defects] == []
    assert len(results.outcomes) == len(cases)
    assert {outcome.status for outcome in results.outcomes} == {"accepted", "dropped", "refused"}
    assert results.growth < 150


def test_what_people_bring_is_read_or_has_a_reason(tmp_path: Path) -> None:
    cases = list(badinput.cases(seed=1, number=NUMBER_OF_FIELD, kinds=fieldinput.KINDS))
    for family in fieldinput.FAMILIES:
        checkpoint(family)  # Built once, not by every worker.
    results = reading.read_all(cases, tmp_path)
    print(json.dumps(results.summary(), indent=1))
    assert [vars(outcome) for outcome in results.defects] == []
    assert len(results.outcomes) == len(cases)
    assert {outcome.status for outcome in results.outcomes} <= {"accepted", "dropped"}, "no single row ends the reading"


def test_cases_depend_only_on_their_seed(tmp_path: Path) -> None:
    def contents_of(seed: int, name: str) -> list[bytes]:
        contents = []
        for index, case in enumerate(badinput.cases(seed, 40)):
            if case.name.startswith(("damaged image", "broken", "odd rows")):
                folder = tmp_path / name / str(index)
                folder.mkdir(parents=True)
                case.write(folder)
                contents += [path.read_bytes() for path in sorted(folder.iterdir())]
        return contents

    assert contents_of(3, "a") == contents_of(3, "b") != contents_of(4, "c")


@pytest.mark.parametrize("defect", ["traceback", "hang", "crash", "misjudged"])
def test_defects_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defect: str) -> None:
    def bad(folder: Path, written: WrittenCase) -> reading.Outcome:
        if defect == "traceback":
            raise RuntimeError("left the reader")
        if defect == "crash":
            os._exit(3)
        if defect == "hang":
            os.system("sleep 60")
        return reading.Outcome("", "accepted")

    monkeypatch.setitem(reading.READERS, "prompts", bad)
    monkeypatch.setattr(reading, "LONGEST_SILENCE", 5.0)
    case = Case("a cut image", "x", badinput.cut_image)
    good = Case("a recipe", "y", badinput.odd_override)
    results = reading.read_all([case, good], tmp_path)
    assert [outcome.status for outcome in results.defects] == [defect]
    assert len(results.outcomes) == 2, "the following cases are read as well"
