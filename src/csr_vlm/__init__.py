"""Align vision-language models with Calibrated Self-Rewarding.

``from csr_vlm import Recipe, Run, make_pairs, score, search``. Importing the package loads no heavy
library; docs/python.md has examples.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from csr_vlm.api import Recipe, Run, ScoredSentence, make_pairs, score, search

__all__ = ["Recipe", "Run", "ScoredSentence", "make_pairs", "score", "search"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("csr_vlm.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
