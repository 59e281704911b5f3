"""Test what an attacker can put into a run directory, a benchmark checkout, or a judge's reply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from csr_vlm.cli import console
from csr_vlm.cli.app import app
from csr_vlm.config.load import resolve
from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.answers import read_evaluation_prompts
from csr_vlm.evaluation.hallucination.hallusion import HallusionSuite
from csr_vlm.evaluation.hallucination.mmhal import MMHalSuite
from csr_vlm.playground.same_site import SameSiteOnly
from csr_vlm.report.reproduction_page import render
from csr_vlm.store import files
from csr_vlm.store.run import Run
from tests.hallucination_stubs import picture, write_hallusion, write_mmhal
from tests.unit.builders import REQUIRED
from tests.unit.test_report import Page

SCRIPT = "</title><script>window.owned = 1</script><img src=x onerror=alert(1)>"
ERASE = "\x1b[2J\x1b]0;owned\x07"
"""Erases a terminal and sets its title."""


def hostile_run(root: Path) -> Run:
    """Create a run whose evaluation has scripts and terminal codes where a judge's name and a protocol stand."""
    run = Run.create(root, resolve(REQUIRED | {"iterations": 1}))
    for number in (0, 1):
        protocol = {"judge": {"served_by": [f"{SCRIPT}{ERASE}"]}, f"key {SCRIPT}{ERASE}": f"{SCRIPT}{ERASE}"}
        metric = {"value": 2.5, "low": 2.0, "high": 3.0, "n": 96}
        metrics = {"mmhal_score": metric, f"mmhal_score_{ERASE}{SCRIPT}": metric}
        document = {"metrics": metrics, "protocol": protocol, "rows": []}
        files.write_json(run.evaluation_path(number, "mmhal"), document)
        run.mark_done(number, "evaluate")
    run.mark_done(1, "train")
    return run


def test_a_forged_evaluation_runs_no_script_on_the_page(tmp_path: Path) -> None:
    page = Page(render([hostile_run(tmp_path / "run")]))
    assert not page.all("script")
    assert not page.all("img")
    assert "window.owned" in page.text, "it is shown, as text"


def test_a_forged_evaluation_reaches_no_terminal(tmp_path: Path) -> None:
    run = hostile_run(tmp_path / "run")
    shown = CliRunner().invoke(app, ["eval", str(run.root)])
    assert shown.exit_code == 0, shown.exception
    assert "\\x1b[2J" in shown.output, "shown as its code"
    assert "\x1b" not in shown.output
    assert "\x07" not in shown.output


def test_titles_and_headings_of_tables_and_log_lines_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(f"judged by {ERASE}", ["", ERASE], [[ERASE, ERASE]])
    console.log(f"the judge is {ERASE}")
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert shown.out.count("\\x1b[2J") == 4
    assert "\\x1b[2J" in shown.err


@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd", "..\\outside.png", "https://example.org/a.png"])
def test_a_benchmark_reads_no_picture_outside_its_folder(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "outside.png")
    (tmp_path / "checkout").mkdir()
    folder = write_hallusion(tmp_path / "checkout")
    rows = json.loads((folder / "HallusionBench.json").read_text())
    for row in rows:
        row["filename"] = name
    (folder / "HallusionBench.json").write_text(json.dumps(rows))
    (part,) = HallusionSuite(folder).parts()
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in part.rows))
    with pytest.raises(CsrError, match=r"outside the image root|is a URL, which is not fetched|does not exist"):
        read_evaluation_prompts(prompts, part.images, images=tmp_path / "bytes")


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '[{"category": ' * 5_000, "{}", "[1, 2]", '[{"visual_input": {}}]', "\0", ""]
)
def test_a_hostile_questions_file_ends_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "HallusionBench.json").write_text(content)
    with pytest.raises(CsrError) as failure:
        HallusionSuite(tmp_path)
    assert "\n" not in failure.value.message


def test_places_in_a_hostile_judge_prompt_are_filled_and_not_evaluated(tmp_path: Path) -> None:
    """A prompt is filled piece by piece, so that neither it nor an answer is a format string."""
    write_mmhal(tmp_path)
    places = "{0.__class__.__mro__} {} {} {} {} {answer!r:>99999999}"
    (tmp_path / "eval_gpt4.py").write_text(f"template = {places!r}")
    suite: Any = MMHalSuite(tmp_path)
    request = suite._request(suite._questions[0], "{} {0.__class__} {question}")
    assert request.startswith("{0.__class__.__mro__} Boat, Fish What is here 0? A {boat}. {} {0.__class__} {question} ")
    assert len(request) < 200


@pytest.mark.parametrize(
    ("kind", "headers", "expected"),
    [
        ("http", [(b"host", b"127.0.0.1:7860")], "served"),
        ("http", [(b"Host", b"localhost:7860"), (b"Origin", b"http://localhost:7860")], "served"),
        ("http", [(b"host", b"127.0.0.1:7860"), (b"origin", b"http://127.0.0.1:8000")], 403),
        ("http", [(b"host", b"127.0.0.1:7860"), (b"origin", b"null")], 403),
        ("http", [(b"host", b"rebound.example:7860"), (b"origin", b"http://rebound.example:7860")], 403),
        ("http", [(b"host", b"[::1"), (b"origin", b"http://[::1")], 403),
        ("http", [], 403),
        ("websocket", [(b"host", b"127.0.0.1:7860"), (b"origin", b"https://example.org")], "websocket.close"),
        ("lifespan", None, "served"),
    ],
)
def test_the_local_page_answers_only_itself(
    kind: str, headers: list[tuple[bytes, bytes]] | None, expected: Any
) -> None:
    sent: list[dict[str, Any]] = []

    async def page(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"status": "served"})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": kind} | ({} if headers is None else {"headers": headers})
    # Nothing here waits, so no event loop is needed; a browser's tests may have left one running.
    with pytest.raises(StopIteration):
        SameSiteOnly(page)(scope, None, send).send(None)
    assert sent[0].get("status", sent[0].get("type")) == expected


def test_looking_at_a_strangers_run_runs_no_code_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's configuration may name a scorer that is code; only what loads the scorer may run it."""
    planted = tmp_path / "owned"
    (tmp_path / "planted.py").write_text(f"open({str(planted)!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    scorer = {"path": "python:planted:Scorer", "trust_import": True}
    run = Run.create(tmp_path / "run", resolve(REQUIRED | {"iterations": 1, "scorer": scorer}))
    for command in (["show"], ["report"], ["eval"], ["watch", "--once"], ["reproduce"]):
        shown = CliRunner().invoke(app, [command[0], str(run.root), *command[1:]])
        assert not isinstance(shown.exception, ImportError | ModuleNotFoundError), command
        assert not planted.exists(), command


def test_links_in_a_strangers_run_show_no_other_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret of another user")
    run = hostile_run(tmp_path / "run")
    for name in ("eval/mmhal.json", "eval/world.json", "pairs.parquet", "done/pairs.json"):
        path = run.iteration(1) / name
        path.unlink(missing_ok=True)
        path.symlink_to(secret)
    for command in ("eval", "show", "report"):
        shown = CliRunner().invoke(app, [command, str(run.root)])
        assert "secret of another" not in shown.output, command
        assert shown.exception is None or isinstance(shown.exception, CsrError | SystemExit), command
    report = run.root / "report.html"
    assert not report.exists() or "secret of another" not in report.read_text(encoding="utf-8")
