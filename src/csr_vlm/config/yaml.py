"""YAML that nobody has checked: recipes, overrides, and the settings of runs that come from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from csr_vlm.core.errors import CsrError

_MOST_CHARACTERS = 200_000
"""Of a recipe; the largest here has 3,000."""
_MOST_VALUES = 20_000
DEEPEST = 40


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a string, and yes, no, on and off as truth values; here they are what people mean."""


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_yaml(text: str) -> Any:
    """Read YAML that nobody has checked.

    Raises:
        ValueError: It is no YAML, or stands for more than a configuration ever holds.
    """
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"it is longer than {_MOST_CHARACTERS:,} characters")
    try:
        loaded = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(_yaml_problem(error)) from None
    except (RecursionError, ArithmeticError, TypeError, AttributeError) as error:
        raise ValueError(f"it is nested too deeply or holds no plain value ({type(error).__name__})") from None
    _refuse_bomb(loaded)
    return loaded


def _refuse_bomb(loaded: Any) -> None:
    """Refuse aliases of aliases, a kilobyte of which stands for gigabytes, and those that go round."""
    waiting, number = [(loaded, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        number += 1
        if number > _MOST_VALUES or depth > DEEPEST:
            raise ValueError(f"it holds more than {_MOST_VALUES:,} values, or {DEEPEST} levels of them")
        if isinstance(value, dict):
            waiting += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list | tuple | set):
            waiting += [(part, depth + 1) for part in value]


def read_yaml(path: Path, hint: str) -> dict[str, Any]:
    """Read a file of settings.

    Raises:
        CsrError: It cannot be read, or holds none; with ``hint``.
    """
    try:
        if not path.is_file():
            raise ValueError("it is no ordinary file")
        with path.open(encoding="utf-8") as handle:
            loaded = load_yaml(handle.read(_MOST_CHARACTERS + 1))
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CsrError(f"{path} cannot be read as YAML: {reason}", hint) from None
    if not isinstance(loaded, dict):
        raise CsrError(f"{path} holds no configuration", hint)
    return loaded


def _yaml_problem(error: Exception) -> str:
    """Word where and why a text is no YAML."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())[:300]
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', '')}"
