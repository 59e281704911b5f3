"""Resolve a recipe and ``key=value`` overrides into a configuration, and explain what is wrong with them.

A configuration is the defaults, overlaid by the preset's block, its settings for the size of the model, the
recipe file and the overrides, in this order. Unknown keys are rejected with the closest valid name.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from csr_vlm.config.model_size import guess_parameters
from csr_vlm.config.schema import RunConfig, ScorerConfig, presets, presets_of_any_size, size_class
from csr_vlm.config.shipped import shipped_recipes
from csr_vlm.config.yaml import MAX_DEPTH, load_yaml, read_yaml
from csr_vlm.core.errors import CsrError, suggestion
from csr_vlm.core.secrets import is_secret_name


def load_config(recipe: Path | None, overrides: Iterable[str] = (), base: Mapping[str, Any] | None = None) -> RunConfig:
    """Load a recipe, apply the overrides, and overlay the result on its preset.

    Args:
        recipe: YAML file, or the name of a shipped recipe. Relative paths in it are relative to the working directory.
        overrides: ``dotted.key=value``, values in YAML.
        base: Plain data to use in place of a recipe, such as the resolved configuration of a run.

    Raises:
        CsrError: The file cannot be read, or an option is unknown or out of bounds.
    """
    layer = dict(base or {}) if recipe is None else _read_recipe(recipe)
    previous = ""
    for override in overrides:
        layer = merged(layer, _parse_override(override, previous))
        previous = override
    return resolve(layer)


def resolve(layer: Mapping[str, Any]) -> RunConfig:
    """Overlay plain data on the preset it names, as it is for a model of this size, and validate the result.

    Raises:
        CsrError: An option is unknown, out of bounds, or a secret.
    """
    _refuse_secrets(layer)
    name = str(layer.get("preset", "calibrated"))
    block = presets().get(name, {})
    if name not in presets_of_any_size():
        block = merged(block, _settings_for_size(layer))
    try:
        return RunConfig.model_validate(merged(block, layer))
    except ValidationError as error:
        raise CsrError(*_explain(error)) from None


def _settings_for_size(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings for models of this size (``sizes.yaml``)."""
    model = layer.get("model")
    path = model.get("path") if isinstance(model, Mapping) else None
    settings: Mapping[str, Any] = size_class(guess_parameters(path) if isinstance(path, str) else None)["settings"]
    return settings


def _refuse_secrets(layer: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse settings that hold a secret: recipes are stored in runs, and shared."""
    for name, value in layer.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            _refuse_secrets(value, f"{key}.")
        elif value not in (None, False, "") and is_secret_name(str(name)):
            raise CsrError(
                f"{key} is a secret, and recipes are stored and shared",
                "remove it; for the hub use hf auth login or HF_TOKEN, for a vLLM server VLLM_API_KEY",
            )


def recipe_name(path: Path) -> str:
    """Return the name of a recipe: that of its file without the suffix, or of a shipped recipe.

    Example:
        >>> recipe_name(Path("recipes/llava-1.5-7b.yaml")), recipe_name(Path("llava-1.5-7b"))
        ('llava-1.5-7b', 'llava-1.5-7b')
    """
    return path.stem if path.suffix in {".yaml", ".yml"} else path.name


def scorer_config(**settings: Any) -> ScorerConfig:
    """Validate a scorer that is not part of a run's configuration.

    Raises:
        CsrError: An option is unknown or out of bounds.
    """
    try:
        return ScorerConfig.model_validate(settings)
    except ValidationError as error:
        raise CsrError(*_explain(error)) from None


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Overlay ``above`` on ``below``, recursively; anything but two mappings is replaced."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _read_recipe(path: Path) -> dict[str, Any]:
    if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises on names that are too long
        shipped = shipped_recipes().get(str(path))
        if shipped is None:
            raise CsrError(f"recipe or run {path} does not exist", _recipe_hint(path))
        path = shipped
    return read_yaml(path, "csr recipes quickstart writes an example")


def _parse_override(text: str, previous: str) -> dict[str, Any]:
    key, separator, value = text.partition("=")
    if previous and key not in option_keys() and not (separator and re.fullmatch(r"[\w.]+", key)):
        raise CsrError(
            f"{text[:200]!r} is not a valid override",
            f"if it belongs to the value before it, put that in quotes: {_quoted(previous.partition('=')[0])}",
        )
    if not separator or not all(key.split(".")) or key.count(".") >= MAX_DEPTH:
        close = difflib.get_close_matches(key, option_keys(), n=1)
        example = f"{close[0]}=..." if close else "method.lambda=0.7"
        raise CsrError(f"{text[:200]!r} is not a valid override", f"write dotted.key=value, such as {example}")
    try:
        parsed = load_yaml(value)
    except ValueError:
        if value.startswith(("[", "{")):
            raise CsrError(
                f"{key}={value[:200]} is not valid YAML", f"put texts, and the whole, in quotes: {_quoted(key)}"
            ) from None
        parsed = value
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    result: dict[str, Any] = parsed
    return result


_REMOVED = {
    "method.pairs.questions.pattern": "questions are about the things of method.claims.lexicon now; remove it, and set "
    "method.pairs.questions.per_prompt (0 for none)",
    "method.search.filters.repeats": "use method.search.filters.loops; method.reward.repeat_penalty rates repeats",
    "method.search.filters.non_latin": "use method.search.filters.other_scripts",
    "method.pairs.questions.question": "write method.pairs.questions.wordings, a list",
}
"""Options that this version has no longer, and what to do about each."""


def without_unused_options(layer: Any) -> Any:
    """Return a run's stored configuration without options that this version has no longer and that were off.

    Example:
        >>> without_unused_options({"method": {"search": {"filters": {"repeats": False, "min_chars": 1}}}})
        {'method': {'search': {'filters': {'min_chars': 1}}}}
    """
    kept = copy.deepcopy(layer)
    for key in _REMOVED:
        *sections, name = key.split(".")
        section = kept
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and name in section and not section[name]:
            del section[name]
    return kept


def _quoted(key: str) -> str:
    """Return an example of a quoted override."""
    return f"""'{key}=["What is it?"]'""" if key in ("data.questions", "evaluation.stop_if") else f"'{key}=...'"


_MESSAGES = {
    "tuple_type": "should be a list, such as [a, b]",
    "list_type": "should be a list, such as [a, b]",
    "int_parsing": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_parsing": "should be a number",
    "bool_parsing": "should be true or false",
    "string_type": "should be text",
}
"""Plain wordings of pydantic's error types."""


def _explain(error: ValidationError) -> tuple[str, str]:
    """Return the message and the hint for the first validation error."""
    first = error.errors(include_url=False)[0]
    # Pydantic also names the branch of a union, such as str, which is not part of the key.
    parts = [str(part) for part in first["loc"] if not re.match(r"(str|int|float|tuple|list)\b", str(part))]
    key = ".".join(parts) or "configuration"
    if first["type"] == "extra_forbidden" and key in _REMOVED:
        return f"{key} is an option of version 0.1", _REMOVED[key]
    if first["type"] == "extra_forbidden":
        return f"unknown option {key}", _hint_for_key(key, _option_names(RunConfig, first["loc"][:-1]))
    if first["type"] == "missing":
        return f"{key} is missing", f"set it in the recipe or as {key}=..."
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = _MESSAGES.get(first["type"], message)
    if key == "configuration":
        return f"the settings are inconsistent: {message}", "docs/configuration.md lists every option"
    hint = "no value was given" if first["input"] is None else f"the value was {_shown(first['input'])}"
    if first["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        hint += f"; {suggestion(str(first['input']), choices)}"
    if first["type"] == "string_type" and first["input"] is not None:
        hint += "; put the text in quotes"
    if first["type"] in ("tuple_type", "list_type") and isinstance(first["input"], str):
        hint += f"; write {_quoted(key)}" if key == "data.questions" else ""
    return f"{key} {message}" if message.startswith("should") else f"{key}: {message}", hint


def _shown(value: Any) -> str:
    """Format a value as the user wrote it, not as Python does."""
    if isinstance(value, str | float):
        return repr(value)[:200]
    try:
        return json.dumps(value, ensure_ascii=False, default=str)[:200]
    except (ValueError, TypeError):
        return repr(value)[:200]


def _hint_for_key(key: str, siblings: list[str]) -> str:
    """Suggest an option: a sibling with a similar name, or one of the same or a similar name elsewhere."""
    *parents, name = key.split(".")
    if name in _TRL_OPTIONS:
        return f"did you mean training.trl.{name}?"
    if close := difflib.get_close_matches(name, siblings, n=1):
        return f"did you mean {'.'.join([*parents, close[0]])}?"
    last_parts = {option: option.rpartition(".")[2] for option in option_keys()}
    close = difflib.get_close_matches(name, last_parts.values(), n=1, cutoff=0.8)
    elsewhere = [option for option, last in last_parts.items() if last in close]
    return f"did you mean {' or '.join(elsewhere)}?" if elsewhere else f"expected one of: {', '.join(siblings)}"


_TRL_OPTIONS = frozenset(
    (
        *(
            "learning_rate",
            "num_train_epochs",
            "max_steps",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
        ),
        *("beta", "loss_type", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "weight_decay", "max_grad_norm"),
        *("bf16", "fp16", "gradient_checkpointing", "optim", "report_to", "logging_steps", "adam_beta1", "adam_beta2"),
    )
)
"""Options of trl.DPOConfig that are often looked for elsewhere; the library itself is not imported for a hint."""


def _recipe_hint(path: Path) -> str:
    """Suggest a recipe, beside the path or in recipes/, or the name of a shipped one."""
    recipes: dict[str, Path | str] = {name: name for name in shipped_recipes()}
    recipes |= {file.stem: file for folder in (Path("recipes"), path.parent) for file in sorted(folder.glob("*.y*ml"))}
    close = difflib.get_close_matches(recipe_name(path), recipes, n=1)
    if close:
        return f"did you mean {recipes[close[0]]}?"
    known = ", ".join(map(str, recipes.values()))
    return f"expected one of: {known}" if recipes else "give the path of a YAML file"


def option_keys(section: type[BaseModel] | None = None, prefix: str = "") -> list[str]:
    """List the dotted keys of all options, in the order of the schema."""
    keys = []
    for key, field in fields_of(section or RunConfig):
        inner = section_of(field.annotation)
        keys += option_keys(inner, f"{prefix}{key}.") if inner else [prefix + key]
    return keys


def fields_of(section: type[BaseModel]) -> list[tuple[str, Any]]:
    """List (option name, pydantic field) of a section."""
    return [(field.alias or name, field) for name, field in section.model_fields.items()]


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds; None for a plain value or a list."""
    candidates = (annotation, *(() if get_origin(annotation) is tuple else get_args(annotation)))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _option_names(section: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """List the names of the options at a location that pydantic reports."""
    for part in location:
        if isinstance(part, int):  # an index into a list of sections
            continue
        field = next(f for name, f in section.model_fields.items() if part in (name, f.alias))
        candidates = (field.annotation, *getattr(field.annotation, "__args__", ()))
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return [name for name, _ in fields_of(section)]
