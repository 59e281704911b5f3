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
