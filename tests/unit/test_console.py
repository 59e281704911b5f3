"""Test what the console writes to a pipe."""

from __future__ import annotations

import pytest

from csr_vlm.cli import console


def test_a_table_in_a_pipe_cuts_no_name(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a name of a picture " * 10
    console.print_table("", ["", "value"], [[name, "0.5"], ["short", "1"]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(name)
    assert lines[1].endswith("0.5")


def test_the_last_line_of_progress_is_printed_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_LINE_EVERY", 0.0)
    with console.Terminal().stage("checking", 2) as progress:
        progress.advance()
        progress.advance()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["checking: 1 of 2", "checking: 2 of 2"]
