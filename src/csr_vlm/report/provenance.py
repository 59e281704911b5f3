"""Document where a run's numbers come from and how to reproduce them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from csr_vlm.core.errors import CsrError
from csr_vlm.core.formatting import duration
from csr_vlm.core.secrets import without_secrets
from csr_vlm.evaluation.compare import policy_name
from csr_vlm.store import files
from csr_vlm.store.run import Run, versions
from csr_vlm.store.stage_names import TIMED_STAGES


@dataclass(frozen=True)
class Provenance:
    """Hold what is needed to verify or repeat a run."""

    config: str
    command: str
    versions: Mapping[str, str]
    git: str | None
    written: str | None
    prompts: Mapping[str, Any]
    """Result of the input check; empty before it has finished."""
    timings: list[tuple[str, list[str]]]
    """(policy, duration of each stage)."""
    total: str


def provenance(run: Run) -> Provenance:
    """Gather provenance from the run; versions come from the manifest, written when the results were made."""
    path = run.manifest_path
    try:
        manifest = files.read_document(path)
    except CsrError:  # missing or damaged: the next csr run writes it again from the markers
        manifest = files.Document(path, {})
    seconds = _stage_seconds(run)
    return Provenance(
        config=yaml.safe_dump(without_secrets(run.config.dump()), sort_keys=False, allow_unicode=True),
        command=f"csr run {shlex.quote(str(run.root / 'config.yaml'))} --out DIR",
        versions=manifest.get("versions") or versions(),
        git=manifest.get("git"),
        written=manifest.get("written"),
        prompts=run.result(0, "prompts") if run.is_done(0, "prompts") else {},
        timings=[
            (
                policy_name(number).capitalize(),
                [duration(by_stage.get(stage)) for stage in TIMED_STAGES],
            )
            for number, by_stage in seconds.items()
        ],
        total=duration(sum(value for by_stage in seconds.values() for value in by_stage.values())),
    )


def _stage_seconds(run: Run) -> dict[int, dict[str, float]]:
    """Map iteration and finished stage to its duration in seconds."""
    seconds: dict[int, dict[str, float]] = {}
    for number in range(run.config.iterations + 1):
        stored = {
            stage: run.result(number, stage).get("seconds") for stage in TIMED_STAGES if run.is_done(number, stage)
        }
        timed = {stage: float(value) for stage, value in stored.items() if value is not None}
        if timed:
            seconds[number] = timed
    return seconds
