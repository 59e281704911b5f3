"""Test that docstrings begin with an imperative verb and that spelling is American."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "csr_vlm"
MODULES = sorted(PACKAGE.rglob("*.py"))
TEXTS = [
    *MODULES,
    *sorted(path for path in PACKAGE.rglob("*") if path.suffix in {".yaml", ".j2", ".jinja"}),
    ROOT / "README.md",
    *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "log.md"),
]
NOT_VERBS = {
    *("A", "An", "The", "This", "It", "There", "One", "Each", "Also"),
    *("What", "Which", "Whether", "How", "Where", "Who", "Word"),
}
VERBS_IN_S = {"Access", "Address", "Compress", "Discuss", "Express", "Focus", "Guess", "Pass", "Process"}
BRITISH = re.compile(
    r"colour|neighbour|behaviour|licence|analys(?:e|ed|er|ing)\b"
    r"|(?:tokeni|normali|recogni|summari|optimi|initiali|standardi)s(?:e|ing|ation)",
    re.IGNORECASE,
)
Documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def violations(source: str) -> Iterator[str]:
    """Yield the line and the beginning of every docstring that does not begin with an imperative verb."""
    for node in ast.walk(ast.parse(source)):
        docstring = ast.get_docstring(node) if isinstance(node, Documented) else None
        if docstring is not None and not begins_with_verb(docstring):
            yield f"{getattr(node, 'lineno', 1)}: {docstring.splitlines()[0] if docstring else ''}"


def begins_with_verb(docstring: str) -> bool:
    word = re.match(r"[A-Z][a-z]+(?:-[a-z]+)?\b", docstring)
    if word is None or word[0] in NOT_VERBS or word[0].endswith("ing"):
        return False
    return not word[0].endswith("s") or word[0] in VERBS_IN_S


def test_there_is_something_to_read() -> None:
    assert len(MODULES) > 100
    assert len(TEXTS) > len(MODULES) + 20


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_docstrings_begin_with_an_imperative_verb(path: Path) -> None:
    assert list(violations(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "docstring",
    [
        "A batch.",
        "The batch.",
        "What is trained.",
        "Whether it is done.",
        "Returns a batch.",
        "Scenes as files.",
        "Measuring a policy.",
        "return a batch.",
        "(rows, tokens)",
        "``batch``",
        "",
    ],
)
def test_other_docstrings_are_rejected(docstring: str) -> None:
    for source in (
        f'"""{docstring}"""',
        f'class Batch:\n    """{docstring}"""',
        f'class Batch:\n    def rows(self):\n        """{docstring}"""',
        f'async def rows():\n    """{docstring}"""',
    ):
        assert len(list(violations(source))) == 1
        assert not list(violations(source.replace(f'"""{docstring}"""', '"""Return a batch."""')))


@pytest.mark.parametrize("verb", sorted(VERBS_IN_S))
def test_imperative_verbs_in_s_are_accepted(verb: str) -> None:
    assert begins_with_verb(f"{verb} the rows.")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_spelling_is_american(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert [text[max(match.start() - 30, 0) : match.end() + 10] for match in BRITISH.finditer(text)] == []


@pytest.mark.parametrize(
    "word",
    [
        *("coloured", "tokenised", "Normalising", "recognise", "summarise", "optimisation", "neighbours"),
        *("behaviour", "licence", "analyse", "analysed", "initialise", "standardised"),
    ],
)
def test_british_spelling_is_detected(word: str) -> None:
    assert BRITISH.search(f"some {word} text")


@pytest.mark.parametrize("word", ["colored", "tokenized", "optimistic", "analyses", "analysis", "license", "minimum"])
def test_american_spelling_is_accepted(word: str) -> None:
    assert not BRITISH.search(f"some {word} text")
