"""Test our own parsers on bytes that hypothesis and atheris generate."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.faults.parsers import PARSERS, array

FULL = os.environ.get("CSR_FAULTS") == "all"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
PIECES = st.sampled_from(
    [
        *(bytes([symbol]) for symbol in b'[]{},:"\\\n-.=\0\xff'),
        b"1.",
        b"e9",
        b"nul",
        b"&a ",
        b"*a ",
        b"!!",
        b" Dr.",
        b"<<: ",
    ]
)
BYTES = st.lists(PIECES | st.binary(max_size=6) | VALUES.map(lambda value: repr(value).encode()), max_size=24).map(
    b"".join
)


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=1500 if FULL else 150)
@given(content=BYTES)
@example(content=b"[" * 5000)
@example(content=b"9" * 5000)
def test_parsers_hold_for_arbitrary_bytes(name: str, content: bytes) -> None:
    PARSERS[name](content)


@given(value=st.lists(VALUES, max_size=6), cut=st.integers(0, 200))
def test_a_complete_array_is_read_and_a_truncated_one_is_rejected(value: list[object], cut: int) -> None:
    import json

    content = json.dumps(value).encode()
    array(content)
    array(content[:cut])


@pytest.mark.skipif(not FULL or importlib.util.find_spec("atheris") is None, reason="make test-faults, with atheris")
@pytest.mark.parametrize("name", PARSERS)
def test_parsers_hold_under_coverage_guided_fuzzing(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.faults.parsers", name, "-max_total_time=30", "-verbosity=0"]
    done = subprocess.run([*command, f"-artifact_prefix={tmp_path}/"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
