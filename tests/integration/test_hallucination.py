"""Run every hallucination benchmark end to end, offline: the shipped model, stubs of the formats, a local judge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from csr_vlm.cli import console
from csr_vlm.cli.app import app
from csr_vlm.core.progress import SilentProgress
from csr_vlm.core.records import Prompt
from csr_vlm.evaluation import resumable_answers
from csr_vlm.evaluation.answers import AnswerSettings
from csr_vlm.evaluation.resumable_answers import SwitchedPolicies, identify_policy, policy_responder
from csr_vlm.store.run import Run
from csr_vlm.world.coco import write_coco
from csr_vlm.world.scenes import HARBOUR, Split
from tests.hallucination_stubs import (
    Reply,
    completion,
    judge_server,
    write_amber,
    write_hallusion,
    write_mmhal,
    write_objecthal,
)

NUM_SCENES = 6


@pytest.fixture(autouse=True)
def _loud(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep libraries from being silenced: that would outlast the test."""
    monkeypatch.setattr(console, "quiet_libraries", lambda: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def run(short_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.open(shutil.copytree(short_run.root, tmp_path_factory.mktemp("suites") / "run"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write all benchmarks: CHAIR, POPE and Object HalBench about scenes, the others about white pictures."""
    folder = tmp_path_factory.mktemp("data")
    write_coco(HARBOUR, Split.DEVELOPMENT, 10_000, NUM_SCENES, folder / "coco")
    for name, write in (("amber", write_amber), ("hallusion", write_hallusion), ("mmhal", write_mmhal)):
        (folder / name).mkdir()
        write(folder / name)
    pictures = sorted((folder / "coco" / "images").iterdir())
    synonyms = (folder / "coco" / "synonyms.txt").read_text()
    questions = {number: path.read_bytes() for number, path in enumerate(pictures, start=1)}
    write_objecthal(folder / "objecthal", questions, synonyms)
    return folder


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def options(data: Path, suites: str) -> list[object]:
    coco = data / "coco"
    pope = [item for setting in ("random", "popular") for item in ("--pope", coco / f"pope_{setting}.jsonl")]
    folders = [item for name in ("amber", "objecthal", "mmhal", "hallusion") for item in (f"--{name}", data / name)]
    chair = ["--chair", coco / "prompts.jsonl", "--annotations", coco / "annotations"]
    return [
        "--suite", suites, *chair, "--words", "plain", "--synonyms", coco / "synonyms.txt", *pope, *folders,
    ]  # fmt: skip


def judged(body: dict[str, Any]) -> Reply:
    """Reply as a judge of both benchmarks would; every third word is taken for an object."""
    text = body["messages"][0]["content"]
    if text.startswith("Rate this"):
        return completion("Rating: 4")
    return completion(json.dumps(text.rpartition("Answer: ")[2].split()[2::3]))


def test_every_suite_runs_with_the_adapter_off_and_on(run: Run, data: Path) -> None:
    suites = ("chair", "pope", "amber", "objecthal", "mmhal", "hallusion")
    with judge_server(judged) as (url, requests):
        judge = ["--judge-url", url, "--judge-model", "judge"]
        shown = invoke("eval", "hallucination", run.root, *options(data, ",".join(suites)), *judge, "--json", "-q")
        assert shown.exit_code == 0, shown.exception
        found = json.loads(shown.stdout)
        assert [(row["iteration"], row["suite"]) for row in found] == [(n, name) for n in (0, 1) for name in suites]
        protocols = {(row["iteration"], row["suite"]): row["protocol_id"] for row in found}
        assert all(protocols[0, name] == protocols[1, name] for name in suites), "the policy is no part of a protocol"
        assert {row["protocol"]["suite"] for row in found} == {"csr-hallucination-1"}
        first = {row["suite"]: row for row in found if row["iteration"] == 0}
        assert first["chair"]["metrics"]["chair_s"]["n"] == NUM_SCENES
        assert first["pope"]["metrics"]["accuracy_random"]["value"] > 0.7, "the base model can answer such questions"
        assert first["mmhal"]["metrics"]["mmhal_score"]["value"] == 4
        assert first["mmhal"]["protocol"]["judge"]["served_by"] == ["judge-2026-01-01"]
        assert first["objecthal"]["metrics"]["objecthal_unread"]["value"] == 0
        assert 0 <= first["amber"]["metrics"]["amber_accuracy"]["value"] <= 1
        answers = run.iteration(0) / "eval" / "hallucination"
        assert len(list(answers.glob("*.protocol.json"))) == 8, "one a part; amber has two, pope two"
        assert not list(answers.glob("*.partial.jsonl"))

        sent = len(requests)
        before = {path: path.read_bytes() for path in answers.glob("*.jsonl")}
        again = invoke("eval", "hallucination", run.root, *options(data, ",".join(suites)), *judge, "-q")
        assert again.exit_code == 0, again.exception
        assert len(requests) == sent, "nothing is asked twice"
        assert before == {path: path.read_bytes() for path in answers.glob("*.jsonl")}
        assert "mmhal, csr-hallucination-1, judged by judge-2026-01-01" in again.stdout
        assert "HallusionBench aAcc" in again.stdout

    compared = json.loads(invoke("compare", run.root, "--json").stdout)
    assert set(suites) <= {comparison["evaluation"] for comparison in compared["comparisons"]}


def test_a_judge_that_goes_down_costs_no_answer(run: Run, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Run.open(shutil.copytree(run.root, data / "down"))
    shutil.rmtree(copy.root / "hallucination", ignore_errors=True)
    for number in (0, 1):
        shutil.rmtree(copy.iteration(number) / "eval" / "hallucination", ignore_errors=True)
    with judge_server(lambda _: (403, {}, b"no credit")) as (url, _):
        judge = ["--judge-url", url, "--judge-model", "judge"]
        failed = invoke("eval", "hallucination", copy.root, *options(data, "mmhal"), *judge, "-q")
        assert "403: no credit" in str(failed.exception)

    def never(*_: object) -> None:
        raise AssertionError("the answers are there")

    monkeypatch.setattr(resumable_answers, "AdapterSwitch", never)
    with judge_server(judged) as (url, requests):
        judge = ["--judge-url", url, "--judge-model", "judge"]
        done = invoke("eval", "hallucination", copy.root, *options(data, "mmhal"), *judge, "-q")
        assert done.exit_code == 0, done.exception
        assert 3 <= len(requests) <= 6, "equal answers of two policies are judged once"


def test_the_cost_is_told_before_anything_runs(run: Run, data: Path) -> None:
    judge = ["--judge-url", "http://localhost:1/v1", "--judge-model", "m", "--judge-price", "1,2", "--estimate"]
    shown = invoke("eval", "hallucination", run.root, *options(data, "mmhal,objecthal"), *judge)
    assert shown.exit_code == 0, shown.exception
    assert f"m will get at most {2 * (3 + NUM_SCENES)} requests" in shown.stdout
    assert "$" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "mmhall"], "did you mean mmhal"),
        (["--suite", ","], "no suite is named"),
        (["--suite", "amber"], "the suite amber needs --amber"),
        (["--suite", "chair", "--chair", "nowhere.jsonl"], "--chair nowhere.jsonl does not exist"),
        (["--suite", "pope"], "the suite pope needs --pope"),
        (["--suite", "hallusion", "--hallusion", "HALLUSION", "--estimate"], "none of these suites has a judge"),
        (["--suite", "mmhal", "--mmhal", "MMHAL"], "give --judge-url and --judge-model"),
        (["--suite", "hallusion", "--hallusion", "HALLUSION", "--iteration", 7], "iteration 7 of .* has no adapter"),
    ],
)
def test_what_is_missing_is_named(run: Run, data: Path, arguments: list[object], message: str) -> None:
    named = {"HALLUSION": data / "hallusion", "MMHAL": data / "mmhal"}
    shown = invoke("eval", "hallucination", run.root, *[named.get(str(item), item) for item in arguments])
    assert shown.exit_code == 1
    with pytest.raises(type(shown.exception), match=message):
        raise shown.exception


def test_an_interrupted_answer_goes_on_with_the_same_answers(
    run: Run, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = SwitchedPolicies(run, [0, 1])
    monkeypatch.setattr(resumable_answers, "_PROMPTS_PER_CHUNK", 2)
    journal = tmp_path / "answers.partial.jsonl"

    def respond(identity: str, number: int = 6) -> list[Any]:
        settings = AnswerSettings(12, temperature=1.0)
        answer = policy_responder(lambda: policies.using(1), settings, SilentProgress(), journal, identity)
        results = answer(prompts[:6])
        return [next(results) for _ in range(number)]

    whole = respond(identify_policy(run, 1))
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6
    for kept in (b"", lines[0], b"".join(lines[:3]), b"".join(lines[:3]) + lines[3][:11], b"damaged\n"):
        journal.write_bytes(kept)
        assert respond(identify_policy(run, 1)) == whole
        assert journal.read_bytes().splitlines(keepends=True) == lines
    journal.write_bytes(lines[0].replace(json.loads(lines[0])[1].encode(), b"forged") + lines[1])
    assert respond(identify_policy(run, 1))[0][0] == "forged", "what is in the journal is used"
    assert respond(identify_policy(run, 0))[0][0] != "forged", "but not for another policy"
