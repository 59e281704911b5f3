"""Read the commands and code blocks of the documentation."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
GENERATED = {"commands.md", "configuration.md"}
SHELLS = {"console", "bash", "sh"}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NEEDS = re.compile(r"#.*\bneeds\b.*\b(GPU|network|hour)\b")
_SPLIT = {"&&", "||", "|", ";"}


@dataclass(frozen=True)
class Block:
    """Represent a fenced block of a page."""

    page: Path
    number: int
    language: str
    text: str

    @property
    def is_shell(self) -> bool:
        return self.language in SHELLS

    def lines(self) -> list[tuple[str, bool]]:
        """List (line, whether a note says that it needs a GPU, the network or an hour).

        A note on a line of its own holds for all that follows.
        """
        noted, found = False, []
        for line in self.text.replace("\\\n", " ").splitlines():
            if line.lstrip().startswith("#"):
                noted = noted or bool(_NEEDS.search(line))
            else:
                found.append((line, noted or bool(_NEEDS.search(line))))
        return found


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(page, number, *found.groups()) for number, found in enumerate(_FENCE.finditer(text))]


def invocations(line: str) -> Iterator[list[str]]:
    """Yield the arguments of every ``csr`` in a line of shell.

    Example:
        >>> list(invocations("X=1 csr world export w && csr run 'a b' -q  # note"))
        [['world', 'export', 'w'], ['run', 'a b', '-q']]
    """
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    command: list[str] = []
    for word in [*lexer, ";"]:
        if word in _SPLIT:
            while command and re.fullmatch(r"[A-Z_]+=\S*", command[0]):
                command.pop(0)
            if command[:1] == ["csr"]:
                yield command[1:]
            command = []
        else:
            command.append(word)
