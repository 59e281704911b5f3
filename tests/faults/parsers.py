"""Define properties of our own parsers that must hold for all byte strings.

Hypothesis draws bytes at random. ``python -m tests.faults.parsers NAME -max_total_time=60``
(``pip install atheris``) searches for bytes that reach new branches of the code.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from csr_vlm.cli.sanitize import printable
from csr_vlm.config.load import load_config
from csr_vlm.config.schema import RunConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.data import json_array
from csr_vlm.data.formats import jsonl
from csr_vlm.data.rows import BadRow, parse_row
from csr_vlm.evaluation import judge as judge_module
from csr_vlm.evaluation import pope
from csr_vlm.evaluation.hallucination import amber, hallusion, mmhal, objecthal
from csr_vlm.method.sentences import SentenceRule

ROOT = Path(__file__).parent.resolve()


def array(content: bytes) -> None:
    """Check that a JSON array is read as by the standard library, or rejected."""
    text = content.decode("utf-8", "surrogateescape")
    try:
        actual = list(json_array._elements(io.StringIO(text)))
    except (ValueError, RecursionError):
        actual = None
    try:
        expected = json.loads(text)
    except (ValueError, RecursionError):
        return
    if isinstance(expected, list):
        assert json.dumps(actual) == json.dumps(expected)
    else:
        assert actual is None


def lines(content: bytes) -> None:
    """Check that every line that is not blank is one row, and that the fields of a valid row can be stored."""
    num_rows = sum(bool(line.strip()) for line in content.split(b"\n"))
    rows = [jsonl._parse(line) for line in jsonl._lines(io.BytesIO(content)) if line is not None and line.strip()]
    assert len(rows) == num_rows
    for row in rows:
        with suppress(BadRow):
            entry = parse_row(row, ROOT)
            f"{entry.row_id}{entry.text}".encode()
            assert isinstance(entry.image, bytes) or entry.image.is_relative_to(ROOT)


def settings(content: bytes) -> None:
    """Check that an override yields a configuration or an error."""
    text = content.decode("utf-8", "replace")
    required = {"model": {"path": "m"}, "scorer": {"path": "s"}, "data": {"prompts": "p"}}
    with suppress(CsrError):
        assert isinstance(load_config(None, [f"training.trl={text}"], base=required), RunConfig)
    with suppress(CsrError):
        load_config(None, [text], base=required)


def judge(content: bytes) -> None:
    """Check that a judge's reply is a chat completion or none, and that what it says is read or is not."""
    with suppress(judge_module._NotAnAnswerError):
        answer = judge_module._answer(content)
        assert isinstance(answer["reply"], str)
        assert isinstance(answer["served_by"], str)
    text = content.decode("utf-8", "replace")
    assert mmhal.read_rating(text) in {None, *range(7)}
    found = objecthal.read_object_list(text)
    assert found is None or all(isinstance(item, str) for item in found)
    assert hallusion.read_yes_or_no(text) in {None, True, False}
    with suppress(CsrError):
        assert all(value >= 0 for value in amber.read_output(text).values())


def sentences(content: bytes) -> None:
    """Check that splitting a text into sentences keeps each word once."""
    text = content.decode("utf-8", "replace")
    assert " ".join(SentenceRule(".!?").cut(text)).split() == text.split()


def shown(content: bytes) -> None:
    """Check that printed text can be encoded and contains no terminal control characters."""
    text = printable(content.decode("utf-8", "surrogateescape"))
    assert not {*map(chr, (*range(9), *range(11, 32), *range(127, 160))), "\u202e"} & set(text.encode().decode())


def answers(content: bytes) -> None:
    text = content.decode("utf-8", "replace")
    assert pope.parse_official(text) in (True, False)
    assert pope.parse_strict(text) in (True, False, None)
    assert pope.parse_lenient(text) in (True, False, None)


PARSERS: dict[str, Callable[[bytes], None]] = {
    parser.__name__: parser for parser in (array, lines, settings, sentences, shown, answers, judge)
}


def main() -> None:
    import atheris

    name, *options = sys.argv[1:]
    atheris.instrument_func(json_array._elements)
    atheris.Setup([sys.argv[0], *options], atheris.instrument_func(PARSERS[name]))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
