"""Text from models and files, made safe to print."""

from __future__ import annotations


def plain(text: str) -> str:
    r"""Replace what a terminal would obey instead of show, such as escape sequences, by "�".

    Example:
        >>> plain("a\x1b[2Jb\nc")
        'a�[2Jb c'
    """
    return "".join(char if char.isprintable() else " " if char.isspace() else "�" for char in text)
