"""Remove placeholders of images and videos from texts.

A placeholder in a question would stand for an image that does not exist, and every processor refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

DATA_SET_PLACEHOLDERS = ("<image>", "<video>")
"""Marks with which data sets say where the image of a question is, whatever the model."""


def remove_placeholders(text: str, tokens: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Remove tokens from a text, also those that the removal of others puts together.

    Returns:
        The text without surrounding white space, and each token that was removed, once.

    Example:
        >>> remove_placeholders("<ima<image>ge> What is it?", ["<image>"])
        ('What is it?', ('<image>',))
    """
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    if not longest_first or not re.search("|".join(map(re.escape, longest_first)), text):
        return text.strip(), ()
    kept, removed = "", dict[str, None]()
    for character in text:
        kept += character
        for token in longest_first:
            if kept.endswith(token):
                kept = kept[: -len(token)]
                removed[token] = None
                break
    return kept.strip(), tuple(removed)
