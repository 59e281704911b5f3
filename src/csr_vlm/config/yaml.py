"""Load untrusted YAML: recipes, overrides, and the settings of runs from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from csr_vlm.core.errors import CsrError

_MAX_CHARACTERS = 200_000
"""Longest accepted file; the largest recipe of this package has 3,000 characters."""
_MAX_VALUES = 20_000
MAX_DEPTH = 40


class _Loader(yaml.SafeLoader):
    """Load 1e-4 as a number, and yes, no, on and off as strings; YAML 1.1 does the opposite."""

    def fetch_more_tokens(self) -> None:
        # The scanner takes time in the square of the open brackets.
        if self.flow_level > MAX_DEPTH:
            raise RecursionError
        super().fetch_more_tokens()


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
    """Load YAML from an untrusted text.

    Raises:
        ValueError: The text is not valid YAML, or larger than any configuration.
    """
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"it is longer than {_MAX_CHARACTERS:,} characters")
    try:
        loaded = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(_yaml_problem(error)) from None
    except (RecursionError, ArithmeticError, TypeError, AttributeError) as error:
        raise ValueError(f"it is nested too deeply or holds an invalid value ({type(error).__name__})") from None
    _check_size(loaded)
    return loaded


def _check_size(loaded: Any) -> None:
    """Reject nested aliases, a kilobyte of which can expand to gigabytes, and recursive ones."""
    remaining, num_values = [(loaded, 0)], 0
    while remaining:
        value, depth = remaining.pop()
        num_values += 1
        if num_values > _MAX_VALUES or depth > MAX_DEPTH:
            raise ValueError(f"it holds more than {_MAX_VALUES:,} values, or more than {MAX_DEPTH} levels")
        if isinstance(value, dict):
            remaining += [(part, depth + 1) for item in value.items() for part in item]
        elif isinstance(value, list | tuple | set):
            remaining += [(part, depth + 1) for part in value]


def read_yaml(path: Path, hint: str) -> dict[str, Any]:
    """Read a file of settings.

    Args:
        hint: Hint of the errors that this raises.

    Raises:
        CsrError: The file cannot be read, or is not a YAML mapping.
    """
    try:
        if not path.is_file():
            raise ValueError("it is not a regular file")
        with path.open(encoding="utf-8") as handle:
            loaded = load_yaml(handle.read(_MAX_CHARACTERS + 1))
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CsrError(f"{path} cannot be read as YAML: {reason}", hint) from None
    if not isinstance(loaded, dict):
        raise CsrError(f"{path} does not hold a configuration", hint)
    return loaded


def _yaml_problem(error: Exception) -> str:
    """Return where and why a text is not valid YAML."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())[:300]
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', '')}"
