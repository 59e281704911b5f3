"""From a recipe to a configuration: the file, the ``key=value`` overrides, and what is wrong with them in words.

A configuration is the defaults, overlaid by the preset's block, the recipe file and the
overrides, in this order. Unknown keys are refused with the nearest name.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from csr_vlm.config.schema import RunConfig, ScorerConfig, presets
from csr_vlm.config.yaml import DEEPEST, load_yaml, read_yaml
from csr_vlm.core.errors import CsrError, nearest


def load_config(recipe: Path | None, overrides: Iterable[str] = (), base: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a recipe and overlay it on its preset.

    Args:
        recipe: YAML file; relative paths in it are relative to the working directory.
        overrides: ``dotted.key=value``, values in YAML.
        base: Used where there is no recipe, such as the resolved configuration of a run.

    Raises:
        CsrError: The file cannot be read, or an option is unknown or out of bounds.
    """
    layer = dict(base or {}) if recipe is None else _read_recipe(recipe)
    for override in overrides:
        layer = merged(layer, _parse_override(override))
    return resolve(layer)


def resolve(layer: Mapping[str, Any]) -> RunConfig:
    """Overlay plain data on the preset it names and validate the whole."""
    block = presets().get(str(layer.get("preset", "calibrated")), {})
    try:
        return RunConfig.model_validate(merged(block, layer))
    except ValidationError as error:
        raise CsrError(*_explain(error)) from None


def scorer_config(**settings: Any) -> ScorerConfig:
    """Validate a scorer that is not part of a run's configuration."""
    try:
        return ScorerConfig.model_validate(settings)
    except ValidationError as error:
        raise CsrError(*_explain(error)) from None


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Overlay ``above`` on ``below``, mapping by mapping."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _read_recipe(path: Path) -> dict[str, Any]:
    if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises on names that are too long
        raise CsrError(f"there is no recipe or run {path}", _recipe_hint(path))
    return read_yaml(path, "see recipes/quickstart.yaml for the form")


def _parse_override(text: str) -> dict[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not all(key.split(".")) or key.count(".") >= DEEPEST:
        near = difflib.get_close_matches(key, option_keys(), n=1)
        example = f"{near[0]}=..." if near else "method.lambda=0.7"
        raise CsrError(f"{text[:200]!r} is not an override", f"write dotted.key=value, such as {example}")
    try:
        parsed = load_yaml(value)
    except ValueError:
        parsed = value
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    result: dict[str, Any] = parsed
    return result


_WORDS = {
    "tuple_type": "should be a list, such as [a, b]",
    "list_type": "should be a list, such as [a, b]",
    "int_parsing": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_parsing": "should be a number",
    "bool_parsing": "should be true or false",
    "string_type": "should be text",
}
"""What pydantic calls valid tuples, integers and strings."""


def _explain(error: ValidationError) -> tuple[str, str]:
    """Turn the first validation error into a message and a hint."""
    first = error.errors(include_url=False)[0]
    # Pydantic also names the branch of a union, such as str, which is no part of the key.
    parts = [str(part) for part in first["loc"] if not re.match(r"(str|int|float|tuple|list)\b", str(part))]
    where = ".".join(parts) or "configuration"
    if first["type"] == "extra_forbidden":
        return f"unknown option {where}", _hint_for_key(where, _option_names(RunConfig, first["loc"][:-1]))
    if first["type"] == "missing":
        return f"{where} is missing", f"set it in the recipe or as {where}=..."
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = _WORDS.get(first["type"], message)
    if where == "configuration":
        return f"the settings do not go together: {message}", "docs/configuration.md has every option"
    hint = "it was given no value" if first["input"] is None else f"it was given as {repr(first['input'])[:200]}"
    if first["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        hint += f"; {nearest(str(first['input']), choices)}"
    if where.startswith("data.") and isinstance(first["input"], bool):
        hint += "; put it in quotes"
    return f"{where} {message}" if message.startswith("should") else f"{where}: {message}", hint


def _hint_for_key(where: str, siblings: list[str]) -> str:
    """Word which option may have been meant: here, or elsewhere under the same or a similar name."""
    *above, name = where.split(".")
    if near := difflib.get_close_matches(name, siblings, n=1):
        return f"did you mean {'.'.join([*above, near[0]])}?"
    keys = {key: key.rpartition(".")[2] for key in option_keys()}
    alike = difflib.get_close_matches(name, keys.values(), n=1, cutoff=0.8)
    elsewhere = [key for key, last in keys.items() if last in alike]
    return f"did you mean {' or '.join(elsewhere)}?" if elsewhere else f"known here: {', '.join(siblings)}"


def _recipe_hint(path: Path) -> str:
    """Word which recipe may have been meant: one beside the path, or of recipes/."""
    there = {found.stem: found for folder in (Path("recipes"), path.parent) for found in sorted(folder.glob("*.y*ml"))}
    near = difflib.get_close_matches(path.stem, there, n=1)
    if near:
        return f"did you mean {there[near[0]]}?"
    return f"known are {', '.join(map(str, there.values()))}" if there else "give the path of a YAML file"


def option_keys(section: type[BaseModel] | None = None, prefix: str = "") -> list[str]:
    """List the dotted keys of all options, in the order of the schema."""
    keys = []
    for key, field in fields_of(section or RunConfig):
        inner = section_of(field.annotation)
        keys += option_keys(inner, f"{prefix}{key}.") if inner else [prefix + key]
    return keys


def fields_of(section: type[BaseModel]) -> list[tuple[str, Any]]:
    return [(field.alias or name, field) for name, field in section.model_fields.items()]


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds, None for a plain value or a list."""
    candidates = (annotation, *(() if get_origin(annotation) is tuple else get_args(annotation)))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _option_names(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        if isinstance(part, int):  # a place in a list of what the field holds
            continue
        field = next(f for name, f in model.model_fields.items() if part in (name, f.alias))
        candidates = (field.annotation, *getattr(field.annotation, "__args__", ()))
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return [field.alias or name for name, field in model.model_fields.items()]
