"""Reading prompts and refusing what would break a run hours later."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from csr_vlm.config import DataConfig
from csr_vlm.data.images import BadImage, load_image
from csr_vlm.errors import CsrError
from csr_vlm.records import Prompt

_SHOWN = 20


@dataclass
class InputReport:
    """What was accepted and what was dropped, by reason, with the first few examples."""

    accepted: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def drop(self, reason: str, example: str) -> None:
        self.dropped[reason] += 1
        if len(self.examples) < _SHOWN:
            self.examples.append(f"{example}: {reason}")

    def dump(self) -> dict[str, Any]:
        return {"accepted": self.accepted, "dropped": dict(self.dropped), "examples": self.examples}


def read_prompts(config: DataConfig, report: InputReport, tick: Callable[[], None] = lambda: None) -> Iterator[Prompt]:
    """Yield the valid prompts of ``config.prompts``, each image decoded once to see that it can be.

    Args:
        report: Filled in passing.
        tick: Called after each row.

    Raises:
        CsrError: The file cannot be read, or a row is bad and ``on_bad_input`` is refuse.
    """
    path = Path(config.prompts)
    root = Path(config.image_root) if config.image_root is not None else path.parent
    seen: set[str] = set()
    for number, row in _rows(path):
        where = f"{path.name} line {number}"
        try:
            prompt = _prompt(row, root.resolve())
            if prompt.prompt_id in seen:
                raise BadRow("duplicate id")
            load_image(prompt.image, config.max_image_pixels)
        except (BadRow, BadImage) as error:
            if config.on_bad_input == "refuse":
                raise CsrError(f"{where}: {error}", "mend it, or set data.on_bad_input=skip") from None
            report.drop(str(error), where)
        else:
            seen.add(prompt.prompt_id)
            report.accepted += 1
            yield prompt
        tick()
        if config.limit is not None and report.accepted >= config.limit:
            return


class BadRow(ValueError):
    """A row that names no usable prompt; the message says why in a few words."""


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        handle = path.open("rb")
    except OSError as error:
        raise CsrError(f"the prompt file {path} cannot be opened: {error.strerror}", "set data.prompts") from None
    with handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):  # JSON, UTF-8, endless numbers, endless nesting
                yield number, None


def _prompt(row: Any, root: Path) -> Prompt:
    if not isinstance(row, dict):
        raise BadRow("not a JSON object")
    prompt_id = next((row[key] for key in ("prompt_id", "id", "question_id") if row.get(key) is not None), None)
    image, text = row.get("image"), row.get("text")
    if not isinstance(prompt_id, str | int) or prompt_id == "" or not isinstance(image, str):
        raise BadRow("no prompt_id or no image")
    if not isinstance(text, str) or not text.replace("<image>", "").strip():
        raise BadRow("empty prompt")
    try:
        path = (root / image).resolve()
        f"{prompt_id}{path}{text}".encode()
    except (ValueError, RuntimeError, OSError):  # NUL, loop of links, half a surrogate pair
        raise BadRow("text or path that cannot be encoded or resolved") from None
    if not path.is_relative_to(root):
        raise BadRow("image outside the image root")
    return Prompt(str(prompt_id), str(path), text.replace("<image>", "").strip())


def count_rows(config: DataConfig) -> int:
    """Count the rows that will be read at most, for a progress bar."""
    total = sum(1 for _ in _rows(Path(config.prompts)))
    return total if config.limit is None else min(total, config.limit)
