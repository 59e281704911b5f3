"""Decide where a sentence ends while it is being generated.

A delimiter alone does not decide: "3.5", "Dr. Low" and "well..." contain one as well. The rule
therefore also looks at the next token; the engine then discards that token, and the next
sentence samples its first token again.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

_CLOSERS = "\"')]}”’»」』）》"
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof sr jr st mt gen col capt lt sgt rev hon vs approx dept est inc ltd co corp "
    "jan feb mar apr jun jul aug sep sept oct nov dec e.g i.e cf al a.m p.m u.s u.k ph.d".split()
)
_LAST_WORD = re.compile(r"([^\s(\[\"']+)$")
_BEFORE_NUMBERS = frozenset({"no", "fig", "eq"})
"""Words that are abbreviations only before a number: "No. 5" but not "No. There is a car."."""


class SentenceRule:
    """Decide whether a text that contains a delimiter is a finished sentence.

    Args:
        delimiters: Characters that end a sentence, such as ".". With a line break among them,
            every line with a word is a sentence, and so is every item of a list.
    """

    def __init__(self, delimiters: str) -> None:
        self.delimiters = delimiters

    def ends(self, text: str, following: str | None) -> bool:
        r"""Return whether the sentence ends after ``text``.

        Args:
            text: The sentence so far.
            following: What the next token adds; None if the response ends here.

        Example:
            >>> rule = SentenceRule(".")
            >>> rule.ends("It costs 3.", "5"), rule.ends("There are 3.", " One")
            (False, True)
            >>> rule.ends("Ask Dr.", " Low"), rule.ends("Well...", " and then")
            (False, False)
            >>> SentenceRule(".\n").ends("- a cup", "\n- a plate")
            True
        """
        body = text.rstrip().rstrip(_CLOSERS)
        if not body or not any(char.isalnum() for char in body):
            return False
        if "\n" in self.delimiters and _breaks_line(text, following):
            return not _is_list_number(body)
        if body[-1] not in self.delimiters:
            return False
        if following is None:
            return True
        if unicodedata.east_asian_width(body[-1]) in "WF":  # no space follows a "。"
            return following[:1] not in _CLOSERS + self.delimiters.replace("\n", "")
        if not (text[-1].isspace() or following[:1].isspace()):
            return False
        if _breaks_line(text, following):
            return not _is_list_number(body)
        if body[-1] != ".":
            return True
        if body.endswith(".."):
            return not following.strip()[:1].islower()
        return not (_is_list_number(body) or _is_abbreviation(body, following))

    def cut(self, text: str) -> Iterator[str]:
        """Yield the sentences of a complete text, and the rest after the last one.

        Example:
            >>> list(SentenceRule(".").cut("It costs 3.5 euros. Ask Dr. Low. And"))
            ['It costs 3.5 euros.', 'Ask Dr. Low.', 'And']
        """
        start = 0
        for end in range(1, len(text) + 1):
            if not text[end - 1].isspace() and self.ends(text[start:end], text[end:] or None):
                yield text[start:end].strip()
                start = end
        if rest := text[start:].strip():
            yield rest


def _is_abbreviation(body: str, following: str) -> bool:
    match = _LAST_WORD.search(body[:-1])
    word = match.group(1) if match else ""
    if word.lower() in _BEFORE_NUMBERS:
        after = following.strip()  # empty if white space is a token of its own: decide at the next token
        return not after or after[0].isdigit()
    return word.lower() in _ABBREVIATIONS or (len(word) == 1 and word.isupper() and word != "I")


def _breaks_line(text: str, following: str | None) -> bool:
    """Return whether a line ends between a text and what follows it."""
    after = following or ""
    return "\n" in text[len(text.rstrip()) :] + after[: len(after) - len(after.lstrip())]


def _is_list_number(body: str) -> bool:
    """Return whether the sentence so far is only the number of a list item, such as "2."."""
    return body.strip()[:-1].isdigit()
