"""Where the numbers come from, and how to get them again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from csr_vlm.core.formatting import duration
from csr_vlm.store import files
from csr_vlm.store.run import Run, versions
from csr_vlm.store.stage_names import TIMED_STAGES

_SECRET = re.compile(r"(hub|auth|access|api)_?(token|key)|secret|password", re.IGNORECASE)


@dataclass(frozen=True)
class Provenance:
    """Everything someone needs who wants to check or repeat a run."""

    config: str
    command: str
    versions: Mapping[str, str]
    git: str | None
    written: str | None
    prompts: Mapping[str, Any]
    """What the check of the inputs reported; empty where it has not finished."""
    timings: list[tuple[str, list[str]]]
    total: str


def provenance(run: Run) -> Provenance:
    """Gather provenance from the manifest, whose versions are those that made the results."""
    path = run.root / "manifest.json"
    manifest = files.read_json(path) if path.is_file() else {}
    seconds = _seconds(run)
    return Provenance(
        config=yaml.safe_dump(without_secrets(run.config.dump()), sort_keys=False, allow_unicode=True),
        command=f"csr run {shlex.quote(str(run.root / 'config.yaml'))} --out DIR",
        versions=manifest.get("versions") or versions(),
        git=manifest.get("git"),
        written=manifest.get("written"),
        prompts=run.result(0, "prompts") if run.is_done(0, "prompts") else {},
        timings=[
            (
                "Base model" if number == 0 else f"Iteration {number}",
                [duration(row.get(stage)) for stage in TIMED_STAGES],
            )
            for number, row in seconds.items()
        ],
        total=duration(sum(value for row in seconds.values() for value in row.values())),
    )


def _seconds(run: Run) -> dict[int, dict[str, float]]:
    """Map iteration and stage to seconds, of finished stages that took their time."""
    found: dict[int, dict[str, float]] = {}
    for number in range(run.config.iterations + 1):
        row = {stage: run.result(number, stage).get("seconds") for stage in TIMED_STAGES if run.is_done(number, stage)}
        timed = {stage: float(value) for stage, value in row.items() if value is not None}
        if timed:
            found[number] = timed
    return found


def without_secrets(value: Any, key: str = "") -> Any:
    """Blank what looks like a credential: a report is made to be passed on."""
    if isinstance(value, dict):
        return {name: without_secrets(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_secrets(inner, key) for inner in value]
    return "(not shown)" if isinstance(value, str) and _SECRET.search(key) else value
