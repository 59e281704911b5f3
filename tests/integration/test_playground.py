"""Test csr chat and what it shares with csr try, on a small run of the embedded world."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from csr_vlm.cli.app import app
from csr_vlm.core.errors import CsrError
from csr_vlm.playground.answering import Sampling
from csr_vlm.playground.session import Playground, contestants
from csr_vlm.store.run import Run


@pytest.fixture
def run(short_run: Run) -> Run:
    return short_run


@pytest.fixture(scope="module")
def playground(short_run: Run) -> Playground:
    return Playground([short_run])


def csr(*arguments: object, **options: str) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], prog_name="csr", **options)


def picture(run: Run) -> str:
    return next(run.prompts()).image


def test_a_question_is_answered_by_every_policy_with_evidence(run: Run) -> None:
    shown = csr("chat", run.root, picture(run), "Describe this image.", "--ask", "boat", "--json")
    assert shown.exit_code == 0, shown.exception
    document = json.loads(shown.stdout)
    assert [answer["policy"] for answer in document["answers"]] == ["base model", "iteration 1"]
    for answer in document["answers"]:
        assert answer["text"].startswith("There is")
        assert answer["claims"]
        for claim in answer["claims"]:
            assert answer["text"][claim["start"] : claim["end"]].endswith(claim["thing"].split()[-1])
    (asked,) = document["asked"]
    assert all(0 <= value <= 1 for value in asked["probability_of_yes"].values())


def test_a_conversation_reads_questions_and_commands(run: Run) -> None:
    lines = ["", "/ask", "/ask boat", "/policies base model", "/policies x", "/picture x", "/temperature -1", "/help"]
    shown = csr("chat", run.root, picture(run), input="\n".join([*lines, "What is there?", "/quit", "never asked"]))
    assert shown.exit_code == 0, shown.exception
    assert shown.stdout.count("\nbase model\n") == 2
    assert shown.stdout.count("\niteration 1\n") == 1, "after /policies, only the base model answers"
    assert "evidence in nats" in shown.stdout
    assert "Is there a boat in this picture?" in shown.stdout
    assert [line for line in shown.stderr.splitlines() if line.startswith("error:")] == [
        "error: 'x' is not a policy of this run",
        "error: the picture x cannot be used: missing",
        "error: '-1' is not a temperature",
    ]


def test_the_audit_of_a_trained_iteration_does_not_propose_to_train(run: Run) -> None:
    assert "next: csr compare" in csr("audit", run.root).stderr


def test_mistakes_are_named(run: Run, tmp_path: Path) -> None:
    assert "iteration 9" in str(csr("chat", run.root, picture(run), "What?", "--iteration", 9).exception)
    assert "cannot be used: missing" in str(csr("chat", run.root, tmp_path / "no.png", "What?").exception)
    assert "--json needs a question" in str(csr("chat", run.root, picture(run), "--json").exception)


def test_a_closed_answer_stops_and_sampling_follows_its_seed(run: Run, playground: Playground) -> None:
    prompt = next(run.prompts())
    before = threading.active_count()
    started = playground.answer("base model", prompt, Sampling(max_new_tokens=200, temperature=2.0))
    next(started)
    started.close()
    assert threading.active_count() == before
    sampled = [
        list(playground.answer("base model", prompt, Sampling(40, temperature=2.0, seed=seed)))[-1]
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_two_runs_share_their_base_model(run: Run, tmp_path: Path) -> None:
    copied = shutil.copytree(run.root, tmp_path / "second")
    assert list(contestants([run, Run.open(copied)])) == ["base model", "first: iteration 1", "second: iteration 1"]
    with pytest.raises(CsrError, match="two runs have the name first"):
        contestants([run, run])
