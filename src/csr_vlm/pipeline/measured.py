"""Find the last run of the same work on the same device, whose times replace assumptions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from csr_vlm.config.schema import RunConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.pipeline.hardware import Hardware, known_gpu
from csr_vlm.store.run import Run

SPREAD = (0.85, 1.0, 1.2)
"""Factors of a measured time in the cheap, the likely and the costly case."""
_COVERED = {
    "generate": ("prefill", "search", "scoring"),
    "pairs": ("claims", "pairs"),
    "train": ("reference", "training"),
    "evaluate": ("evaluation",),
}
"""Stages of an estimate that each stage of a run covers."""
_RELEVANT = {
    "generate": ("model", "method.search", "scorer", "generation"),
    "pairs": ("model", "method.pairs", "scorer"),
    "train": ("model", "method.pairs", "training"),
    "evaluate": ("model", "method.search", "evaluation"),
}
"""Settings that must agree for a time to be comparable."""


@dataclass(frozen=True)
class MeasuredRun:
    """Hold the times of a run that is comparable with a planned one."""

    root: Path
    seconds_per_prompt: Mapping[str, float]
    """Mean over the finished iterations, by stage of the run."""

    def factors(self, seconds: Mapping[str, float], config: RunConfig, num_prompts: int, case: int) -> dict[str, float]:
        """Return the factors that make the estimated seconds of the covered stages add up to what was measured.

        Args:
            seconds: Estimated seconds of all stages, over all iterations.
            config: Settings of the planned run.
            num_prompts: Its prompts.
            case: Index of the case in :data:`SPREAD`.
        """
        factors: dict[str, float] = {}
        for stage, per_prompt in self.seconds_per_prompt.items():
            times = config.iterations + (1 if stage == "evaluate" else 0)
            # Held-out prompts and scenes do not grow with the prompts.
            measured = per_prompt * (1 if stage == "evaluate" else num_prompts) * times * SPREAD[case]
            total = sum(seconds[name] for name in _COVERED[stage])
            factors |= dict.fromkeys(_COVERED[stage], measured / total if total else 0.0)
        return factors

    @property
    def covered(self) -> list[str]:
        """Return the stages of an estimate that were measured."""
        return [name for stage in self.seconds_per_prompt for name in _COVERED[stage]]


def last_comparable_run(config: RunConfig, hardware: Hardware, roots: Iterable[Path]) -> MeasuredRun | None:
    """Find the newest run with the same model and settings on the same device; None if there is none.

    Args:
        config: Settings of the planned run.
        hardware: Where it is to run.
        roots: Run directories to consider.
    """
    found = sorted((root for root in roots if (root / "manifest.json").is_file()), key=_modified, reverse=True)
    for root in found:
        try:
            seconds = _comparable_seconds(Run.open(root), config, hardware)
        except (CsrError, OSError, KeyError, TypeError):  # A damaged run measures nothing.
            continue
        if seconds:
            return MeasuredRun(root, seconds)
    return None


def _comparable_seconds(run: Run, config: RunConfig, hardware: Hardware) -> dict[str, float]:
    ours, theirs = _comparable(config), _comparable(run.config)
    result = {}
    for stage in _COVERED:
        if any(_setting(ours, key) != _setting(theirs, key) for key in _RELEVANT[stage]):
            continue
        iterations = [number for number in run.iterations_done(stage) if _is_same_device(run, number, hardware)]
        if iterations:
            seconds = mean(float(run.result(number, stage)["seconds"]) for number in iterations)
            result[stage] = seconds / (1 if stage == "evaluate" else run.num_prompts)
    return result


def _is_same_device(run: Run, iteration: int, hardware: Hardware) -> bool:
    """Return whether the iteration's search ran on such a device; the base model's evaluation counts as the first's."""
    marker = max(iteration, 1)
    if not run.is_done(marker, "generate"):
        return False
    result = run.result(marker, "generate")
    names = set(result.get("devices", ()))
    if len(names) != 1 or result.get("processes") != hardware.count:
        return False
    (name,) = names
    known = known_gpu(name)
    return bool((known.name if known else name) == hardware.name)


def _comparable(config: RunConfig) -> dict[str, Any]:
    dumped = config.dump()
    dumped["model"].pop("device")
    return dumped


def _setting(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = settings[part]
    return settings


def _modified(root: Path) -> float:
    return (root / "manifest.json").stat().st_mtime
