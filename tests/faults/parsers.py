"""The parsers that are ours, each as a function of bytes that must hold for all bytes.

Hypothesis and atheris call them: ``python -m tests.faults.parsers NAME -max_total_time=60``
(``pip install atheris``) follows the branches of the code where hypothesis draws at random.
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
from csr_vlm.evaluation import pope
from csr_vlm.method.sentences import SentenceRule

ROOT = Path(__file__).parent.resolve()


def array(content: bytes) -> None:
    """A JSON array reads as the standard library reads it, or not at all."""
    text = content.decode("utf-8", "surrogateescape")
    try:
        found = list(json_array._elements(io.StringIO(text)))
    except (ValueError, RecursionError):
        found = None
    try:
        expected = json.loads(text)
    except (ValueError, RecursionError):
        return
    if isinstance(expected, list):
        assert json.dumps(found) == json.dumps(expected)
    else:
        assert found is None


def lines(content: bytes) -> None:
    """Every line that is not blank is one row, and a good row's parts can be stored."""
    wanted = sum(bool(line.strip()) for line in content.split(b"\n"))
    found = [jsonl._parse(line) for line in jsonl._lines(io.BytesIO(content)) if line is not None and line.strip()]
    assert len(found) == wanted
    for row in found:
        with suppress(BadRow):
            entry = parse_row(row, ROOT)
            f"{entry.row_id}{entry.text}".encode()
            assert isinstance(entry.image, bytes) or entry.image.is_relative_to(ROOT)


def settings(content: bytes) -> None:
    """An override gives a configuration or a reason."""
    text = content.decode("utf-8", "replace")
    needed = {"model": {"path": "m"}, "scorer": {"path": "s"}, "data": {"prompts": "p"}}
    with suppress(CsrError):
        assert isinstance(load_config(None, [f"training.trl={text}"], base=needed), RunConfig)
    with suppress(CsrError):
        load_config(None, [text], base=needed)


def sentences(content: bytes) -> None:
    """The sentences of a text are its words, none twice and none lost."""
    text = content.decode("utf-8", "replace")
    assert " ".join(SentenceRule(".!?").cut(text)).split() == text.split()


def shown(content: bytes) -> None:
    """What is printed encodes, and holds nothing that steers a terminal."""
    text = printable(content.decode("utf-8", "surrogateescape"))
    assert not {*map(chr, (*range(9), *range(11, 32), *range(127, 160))), "\u202e"} & set(text.encode().decode())


def answers(content: bytes) -> None:
    text = content.decode("utf-8", "replace")
    assert pope.parse_official(text) in (True, False)
    assert pope.parse_strict(text) in (True, False, None)
    assert pope.parse_lenient(text) in (True, False, None)


PARSERS: dict[str, Callable[[bytes], None]] = {
    parser.__name__: parser for parser in (array, lines, settings, sentences, shown, answers)
}


def main() -> None:
    import atheris

    name, *options = sys.argv[1:]
    atheris.instrument_func(json_array._elements)
    atheris.Setup([sys.argv[0], *options], atheris.instrument_func(PARSERS[name]))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
