"""Find out roughly how many parameters a model has, from its name or its config.json, without any model library."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_SIZE_IN_NAME = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", re.IGNORECASE)
_MAX_CONFIG_BYTES = 10_000_000


def parameters_in_name(path: str) -> int | None:
    """Read the number of parameters in a model's name, such as 7b or 500M; None if the name has none.

    Example:
        >>> parameters_in_name("llava-hf/llava-1.5-7b-hf"), parameters_in_name("HuggingFaceTB/SmolVLM-Instruct")
        (7000000000, None)
    """
    match = _SIZE_IN_NAME.search(Path(path).name)
    return None if match is None else round(float(match[1]) * {"b": 1e9, "m": 1e6}[match[2].lower()])


def parameters_on_disk(path: str) -> int | None:
    """Estimate the parameters of a model's language model from the config.json in a directory.

    A layer of width d with feed-forward width f has about 4 d^2 + 3 d f parameters, the embeddings d per token.

    Returns:
        The estimate, within a third; None if there is no such file, or it does not name these sizes.
    """
    try:
        file = Path(path) / "config.json"
        if not file.is_file() or file.stat().st_size > _MAX_CONFIG_BYTES:
            return None
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        text = {**config, **config.get("text_config", {})}
        width, layers, inner, tokens = (
            int(text[key]) for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
        )
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None
    return layers * (4 * width**2 + 3 * width * inner) + tokens * width


def guess_parameters(path: str) -> int | None:
    """Return the number of parameters by a directory's config.json, or by the name; None if neither tells."""
    return parameters_on_disk(path) or parameters_in_name(path)
