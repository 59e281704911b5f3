"""Read lexicons: the things that a sentence can claim, each with its wordings.

A lexicon is a text file with one thing a line: its name, then its synonyms after commas. ``#``
starts a comment. ``! key: value`` sets how the file is matched; docs/method.md lists the keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from csr_vlm.core.errors import CsrError

_KEYS = frozenset({"match", "conditional", "negation", "hypothetical", "ignored", "plural only"})
_MATCHES = ("english", "words", "characters")


@dataclass(frozen=True)
class Claim:
    """Represent one thing that a sentence asserts of the image."""

    name: str
    """Name of the thing in the lexicon, equal for all its synonyms."""
    wording: str
    """As the sentence words it, in lower case."""
    count: str = ""
    """Number word or digits before it; "a" counts as "one". Empty if there is none."""
    color: str = ""
    """Empty if the sentence gives it no color."""


@dataclass(frozen=True)
class Lexicon:
    """Hold the things that can be claimed."""

    names: Mapping[str, str]
    """Wording to the name of its thing, both in lower case. The name of a wording that claims nothing is empty."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Values of the lines ``! key: value``."""

    @classmethod
    def load(cls, lexicon: str) -> Lexicon:
        """Load a shipped lexicon by its language, such as ``en``, or any other by its path.

        Raises:
            CsrError: There is no such lexicon, or it is not valid.
        """
        folder = resources.files("csr_vlm.method") / "lexicons"
        shipped = sorted(file.name.removesuffix(".txt") for file in folder.iterdir() if file.name.endswith(".txt"))
        source = folder / f"{lexicon}.txt" if lexicon in shipped else Path(lexicon)
        try:
            text = source.read_text(encoding="utf-8").removeprefix("\ufeff")
        except (OSError, UnicodeDecodeError) as error:
            raise CsrError(
                f"the lexicon {lexicon!r} cannot be read: {error}",
                f"give the path of a UTF-8 text file, or one of: {', '.join(shipped)}",
            ) from None
        return cls.parse(text, lexicon)

    @classmethod
    def parse(cls, text: str, source: str = "lexicon") -> Lexicon:
        """Parse the content of a lexicon file.

        A wording that stands on several lines belongs to the first of them.

        Args:
            text: Content of the file.
            source: What error messages call it.

        Raises:
            CsrError: A setting is not valid, or there is no thing in the text.

        Example:
            >>> Lexicon.parse("couch, sofa").names
            {'couch': 'couch', 'sofa': 'couch'}
        """
        names: dict[str, str] = {}
        settings: dict[str, str] = {}
        for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
            if line.startswith("!"):
                key, _, value = (part.strip() for part in line[1:].partition(":"))
                if key not in _KEYS:
                    raise CsrError(
                        f"{source}, line {number}: {key!r} is not a valid setting",
                        f"expected one of: {', '.join(sorted(_KEYS))}",
                    )
                settings[key] = value
            elif line and not line.startswith("#"):
                wordings = [wording.strip().lower() for wording in line.split(",") if wording.strip()]
                for wording in wordings:
                    names.setdefault(wording, wordings[0])
        found = cls(names, settings)
        names.update(dict.fromkeys(found.listed("ignored"), ""))
        if not any(names.values()):
            raise CsrError(f"{source} lists nothing", "write one thing a line, its synonyms after commas")
        if found.match not in _MATCHES:
            raise CsrError(f"{source}: {found.match!r} is not a valid match", f"expected one of: {', '.join(_MATCHES)}")
        return found

    @property
    def match(self) -> str:
        """Return how wordings are matched: ``english`` (the default), ``words`` or ``characters``."""
        return self.settings.get("match", "english")

    def listed(self, key: str) -> list[str]:
        """Return the wordings that a setting lists."""
        return [wording.strip().lower() for wording in self.settings.get(key, "").split(",") if wording.strip()]
