"""Test the judge against a server on this machine that fails, limits the rate, and answers nonsense."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.judge import Judge, JudgeSettings, estimate_cost
from tests.hallucination_stubs import Reply, completion, judge_server

KEY = "a-very-secret-key"


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "the-key-of-openai")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def judge(url: str, folder: Path, waits: list[float] | None = None, **settings: Any) -> Judge:
    recorded = [] if waits is None else waits
    return Judge(JudgeSettings(url, "judge", **settings), folder, recorded.append)


def number(reply: str) -> int | None:
    return int(reply) if reply.isdecimal() else None


def test_replies_are_read_in_order_and_sent_once(tmp_path: Path) -> None:
    def echo(body: dict[str, Any]) -> Reply:
        return completion(body["messages"][0]["content"])

    with judge_server(echo) as (url, requests):
        found = judge(url, tmp_path).ask(["7", "8", "9"], number)
        assert [one.value for one in found] == [7, 8, 9]
        assert {one.served_by for one in found} == {"judge-2026-01-01"}
        assert all(request["temperature"] == 0 and request["path"] == "/v1/chat/completions" for request in requests)
        assert {request["headers"]["Authorization"] for request in requests} == {f"Bearer {KEY}"}
        again = judge(url, tmp_path)
        assert [one.value for one in again.ask(["9", "7", "5"], number)] == [9, 7, 5]
        assert len(requests) == 4, "9 and 7 come from the transcript"
        assert again.protocol(found)["served_by"] == ["judge-2026-01-01"]
    lines = [json.loads(line) for line in (tmp_path / "transcript.jsonl").read_text().splitlines()]
    assert {line["reply"] for line in lines} == {"7", "8", "9", "5"}
    assert KEY not in (tmp_path / "transcript.jsonl").read_text()


def test_another_model_or_another_host_is_asked_anew(tmp_path: Path) -> None:
    with (
        judge_server(lambda _: completion("1")) as (url, requests),
        judge_server(lambda _: completion("2")) as (other, _),
    ):
        assert judge(url, tmp_path).ask(["q"], number)[0].value == 1
        assert judge(other, tmp_path).ask(["q"], number)[0].value == 2
        assert Judge(JudgeSettings(url, "another"), tmp_path).ask(["q"], number)[0].value == 1
        assert len(requests) == 2


def test_a_rate_limit_and_failures_are_waited_out(tmp_path: Path) -> None:
    script = [(429, {"Retry-After": "7"}, b"slow down"), (500, {}, b"oops"), (200, {}, b"<html>"), completion("3")]
    waits: list[float] = []
    with judge_server(lambda _: script.pop(0)) as (url, requests):
        assert judge(url, tmp_path, waits).ask(["q"], number)[0].value == 3
    assert len(requests) == 4
    assert waits[0] == 7, "as long as the server says"
    assert 2 <= waits[1] <= 4 <= waits[2] <= 8, "then longer after each failure"


def test_a_judge_that_stays_down_ends_the_evaluation_and_keeps_what_it_said(tmp_path: Path) -> None:
    def fail_second(body: dict[str, Any]) -> Reply:
        return completion("1") if body["messages"][0]["content"] == "first" else (503, {}, KEY.encode())

    with judge_server(fail_second) as (url, requests):
        with pytest.raises(CsrError, match=r"did not answer in 3 tries: status 503.*rerun") as failure:
            judge(url, tmp_path, tries=3, workers=1).ask(["first", "second"], number)
        assert KEY not in str(failure.value), "not even if the server repeats it"
        assert len(requests) == 4
    with judge_server(lambda _: completion("2")) as (other, requests):
        found = judge(other, tmp_path).ask(["first"], number)
        assert (found[0].value, len(requests)) == (2, 1), "another host is another judge"


def test_a_judge_that_nobody_serves_is_reported(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(CsrError, match="did not answer in 2 tries"):
        judge(url, tmp_path, tries=2).ask(["q"], number)


@pytest.mark.parametrize(("status", "hint"), [(401, "JUDGE_API_KEY"), (404, "--judge-model"), (400, "--judge-url")])
def test_a_refusal_is_not_repeated(tmp_path: Path, status: int, hint: str) -> None:
    with judge_server(lambda _: (status, {}, b"no")) as (url, requests):
        with pytest.raises(CsrError, match=rf"refused a request: status {status}.*{hint}"):
            judge(url, tmp_path).ask(["q"], number)
        assert len(requests) == 1


def test_a_redirect_does_not_carry_the_key_away(tmp_path: Path) -> None:
    with (
        judge_server(lambda _: completion("1")) as (thief, stolen),
        judge_server(lambda _: (302, {"Location": f"{thief}/chat/completions"}, b"")) as (url, _),
        pytest.raises(CsrError, match="redirects are not followed"),
    ):
        judge(url, tmp_path).ask(["q"], number)
    assert stolen == []


def test_the_key_of_openai_goes_to_openai_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_API_KEY")
    with judge_server(lambda _: completion("1")) as (url, requests):
        judge(url, tmp_path).ask(["q"], number)
        assert "Authorization" not in requests[0]["headers"]


def test_nonsense_is_asked_about_once_more_and_never_becomes_a_number(tmp_path: Path) -> None:
    replies = iter(["what?", "4"])
    with judge_server(lambda _: completion(next(replies))) as (url, _):
        assert judge(url, tmp_path / "a").ask(["q"], number)[0].value == 4
    with judge_server(lambda _: completion("what?")) as (url, requests):
        (found,) = judge(url, tmp_path / "b").ask(["q"], number)
        assert (found.value, found.reply, len(requests)) == (None, "what?", 2)
        judge(url, tmp_path / "b").ask(["q"], number)
        assert len(requests) == 2, "nonsense is kept too"
    with judge_server(lambda _: completion(None)) as (url, _):
        assert judge(url, tmp_path / "c").ask(["q"], number)[0].value is None


def test_a_cut_off_transcript_loses_only_its_last_line(tmp_path: Path) -> None:
    with judge_server(lambda body: completion(body["messages"][0]["content"])) as (url, requests):
        judge(url, tmp_path, workers=1).ask(["1", "2"], number)
        path = tmp_path / "transcript.jsonl"
        path.write_bytes(path.read_bytes()[:-9])
        assert [one.value for one in judge(url, tmp_path).ask(["1", "2", "3"], number)] == [1, 2, 3]
        assert len(requests) == 4, "1 is known; 2 and 3 are asked"
        judge(url, tmp_path).ask(["1", "2", "3"], number)
        assert len(requests) == 4


def test_a_huge_reply_is_a_failure(tmp_path: Path) -> None:
    with (
        judge_server(lambda _: completion("1" * 2_000_000)) as (url, _),
        pytest.raises(CsrError, match="more than 1,048,576 bytes"),
    ):
        judge(url, tmp_path, tries=1).ask(["q"], number)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/v1", "localhost:8000/v1", "", "http://"])
def test_only_addresses_of_the_web_are_accepted(tmp_path: Path, url: str) -> None:
    with pytest.raises(CsrError, match="not the address of a judge"):
        judge(url, tmp_path)


def test_the_cost_is_known_before_anything_is_sent() -> None:
    settings = JudgeSettings("http://localhost/v1", "m", max_tokens=100)
    cost = estimate_cost(settings, [4000, 400])
    assert (cost.requests, cost.input_tokens, cost.output_tokens, cost.dollars) == (2, 1100, 200, None)
    assert "at most 2 requests with about 1,100 tokens" in cost.describe("m")
    priced = estimate_cost(JudgeSettings("http://localhost/v1", "m", 100, price=(2.0, 10.0)), [4000, 400])
    assert priced.dollars == pytest.approx(1100 * 2e-6 + 200 * 1e-5)
