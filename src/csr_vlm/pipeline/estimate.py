"""Estimate what a run costs, before any weight is read.

The estimate comes from the model's architecture, the hardware's data sheet and stated assumptions
(:mod:`csr_vlm.pipeline.assumptions`), in a cheap, a likely and a costly case; a comparable run that was made on such
hardware replaces the assumptions about the stages that it timed.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from csr_vlm.config.schema import RunConfig
from csr_vlm.core.progress import Reporter
from csr_vlm.core.records import Prompt
from csr_vlm.data.checking import ModelCheck
from csr_vlm.data.prompts import InputReport, count_rows, no_usable_prompt, read_prompts
from csr_vlm.data.sources import is_local
from csr_vlm.generation.engine_choice import EngineChoice, planned_engine
from csr_vlm.models.architecture import Architecture, read_architecture
from csr_vlm.models.prompt_check import ProcessorCheck
from csr_vlm.pipeline import assumptions
from csr_vlm.pipeline.advice import faster, fitting_rows
from csr_vlm.pipeline.hardware import Hardware, this_cpu, this_gpu
from csr_vlm.pipeline.measured import MeasuredRun, last_comparable_run
from csr_vlm.pipeline.memory_costs import disk_bytes, memory_bytes
from csr_vlm.pipeline.offline_pairs import check_pairs
from csr_vlm.pipeline.preflight import TOO_LARGE_FOR_A_CPU
from csr_vlm.pipeline.prompt_lengths import SAMPLE, PromptLengths, prompt_lengths
from csr_vlm.pipeline.stage_costs import STAGES, StageCosts
from csr_vlm.pipeline.start import require_libraries

_ASSUMED_PROMPTS = 1000
"""Number of prompts to assume if they do not exist yet and data.limit is not set."""
_DOMINATES = 0.4
"""Share of the total from which a stage is said to dominate."""


@dataclass(frozen=True)
class Range:
    """Hold a quantity in the cheap, the likely and the costly case."""

    low: float
    likely: float
    high: float

    def dump(self) -> dict[str, float]:
        """Return JSON data, with three significant digits."""
        return {case: float(f"{value:.3g}") for case, value in vars(self).items()}


@dataclass(frozen=True)
class Plan:
    """Represent what a run costs on some hardware."""

    hardware: Hardware
    architecture: Architecture
    lengths: PromptLengths
    hours: Mapping[str, Range]
    """Hours over all iterations, by stage, and their ``total``."""
    tokens: Mapping[str, float]
    """Tokens through the policy in one iteration, by stage, in the likely case."""
    memory: Mapping[str, Range]
    """Gigabytes on one GPU, by stage."""
    disk_gb: float
    engine: EngineChoice
    max_rows: int
    """Most rows that decode at once."""
    live_rows: float
    """Mean number of rows that decode at once."""
    step_milliseconds: Mapping[str, float]
    """Of a decoding step with an adapter: ``host`` and ``gpu``."""
    bound: str
    """What takes most of the time."""
    faster: Sequence[str]
    measured: MeasuredRun | None

    @property
    def memory_gb(self) -> float:
        """Return the peak memory of one GPU in the likely case."""
        return max(usage.likely for usage in self.memory.values())

    def dump(self) -> dict[str, Any]:
        """Return JSON data."""
        return {
            "hardware": {"name": self.hardware.name, "count": self.hardware.count},
            "parameters": self.architecture.parameters,
            "architecture": self.architecture.source,
            "prompt_tokens": self.lengths.dump(),
            "tokens": {stage: round(number) for stage, number in self.tokens.items()},
            "hours": {stage: hours.dump() for stage, hours in self.hours.items()},
            "bound": self.bound,
            "engine": self.engine._asdict(),
            "max_rows": self.max_rows,
            "live_rows": round(self.live_rows, 1),
            "step_milliseconds": {name: round(value, 2) for name, value in self.step_milliseconds.items()},
            "memory_gb": round(self.memory_gb, 2),
            "memory_by_stage_gb": {stage: usage.dump() for stage, usage in self.memory.items()},
            "disk_gb": round(self.disk_gb, 3),
            "faster": list(self.faster),
            "measured": None
            if self.measured is None
            else {"run": str(self.measured.root), "stages": self.measured.covered},
            "assumptions": assumptions.dump(),
        }


@dataclass(frozen=True)
class Estimate:
    """Represent the checked inputs of a run and its expected cost."""

    data: Mapping[str, Any]
    """Accepted and dropped prompts, and the same for external pairs under ``pairs``."""
    prompts: int
    """Accepted prompts."""
    iterations: int
    plan: Plan | None
    """None if the architecture of the model is unknown."""
    warnings: Sequence[str]

    def dump(self) -> dict[str, Any]:
        """Return JSON data with the keys ``data``, ``estimate`` and ``warnings``."""
        plan = {} if self.plan is None else self.plan.dump()
        return {
            "data": dict(self.data),
            "estimate": {"prompts": self.prompts, "iterations": self.iterations, **plan},
            "warnings": list(self.warnings),
        }


def estimate(
    config: RunConfig,
    reporter: Reporter,
    *,
    out: Path = Path(),
    offline: bool = False,
    hardware: Hardware | None = None,
    runs: Iterable[Path] = (),
) -> Estimate:
    """Check all inputs, and estimate the cost of the run.

    Args:
        config: Configuration of the run.
        reporter: Receives progress.
        out: Run directory, which need not exist; its disk must have room for the run.
        offline: Contact no hub; missing prompts are a warning instead of an error.
        hardware: What to plan for; this machine's GPU, else its CPU, by default.
        runs: Run directories whose times may be used.

    Raises:
        CsrError: The prompts cannot be read, none of them can be used or, unless offline, the model
            does not exist.
    """
    require_libraries(config, offline=offline or hardware is not None)
    warnings: list[str] = []
    report = InputReport()
    sample: list[Prompt] = []
    missing = [source for source in config.data.all_sources if offline and not is_local(source)]
    if missing:
        report.accepted = config.data.limit or _ASSUMED_PROMPTS
        warnings.append(f"{', '.join(missing)} does not exist yet; the estimate assumes {report.accepted} prompts")
        data = report.dump()
    else:
        data = _check_data(config, report, reporter, sample, None if offline else ProcessorCheck.of_run(config))
    if not report.accepted:
        raise no_usable_prompt(config.data, report)
    warnings += report.messages("prompts")
    architecture = read_architecture(config.model, offline=offline)
    plan = None
    if architecture is None:
        warnings.append(
            f"the size of {config.model.path} is unknown: it is not on disk, not in the table of published models, "
            "and not in its name; without --offline its configuration is read from the hub"
        )
    else:
        target = hardware or this_gpu() or this_cpu()
        measured = last_comparable_run(config, target, runs)
        lengths = prompt_lengths(config, architecture, sample)
        plan, likely = _make_plan(config, architecture, target, lengths, report.accepted, measured)
        warnings += _plan_warnings(plan, likely, out)
    if config.model.adapter is not None and not Path(config.model.adapter).is_dir():
        warnings.append(f"model.adapter {config.model.adapter} does not exist")
    return Estimate(data, report.accepted, config.iterations, plan, warnings)


def plan_of_variant(costs: Estimate, config: RunConfig) -> Plan | None:
    """Return the plan of a configuration with the same inputs, model and hardware; None if there is none for them."""
    if costs.plan is None:
        return None
    known = costs.plan
    return _make_plan(config, known.architecture, known.hardware, known.lengths, costs.prompts, known.measured)[0]


def _check_data(
    config: RunConfig, report: InputReport, reporter: Reporter, sample: list[Prompt], model: ModelCheck | None
) -> dict[str, Any]:
    """Read all prompts and external pairs, fill the report and a random sample; return both reports as JSON data."""
    numbers = random.Random(0)
    with reporter.stage("checking prompts and images", count_rows(config.data)) as progress:
        tick = partial(progress.advance, 1)
        rows = read_prompts(config.data, report, seed=config.seed, tick=tick, model=model)
        for number, prompt in enumerate(rows):
            if number < SAMPLE:
                sample.append(prompt)
            elif (place := numbers.randint(0, number)) < SAMPLE:
                sample[place] = prompt
    data = report.dump()
    if config.data.pairs is not None:
        data["pairs"] = check_pairs(config.data, reporter, model=model).dump()
    return data


def _make_plan(
    config: RunConfig,
    architecture: Architecture,
    hardware: Hardware,
    lengths: PromptLengths,
    num_prompts: int,
    measured: MeasuredRun | None,
) -> tuple[Plan, StageCosts]:
    """Compute the costs of all cases; return them with those of the likely case."""
    engine = planned_engine(config, has_gpu=not hardware.is_cpu, processes=hardware.count)
    config = config.with_engine(engine.name)
    costs = [
        StageCosts(config, architecture, hardware, case, num_prompts, lengths.mean, lengths.image, lengths.longest)
        for case in assumptions.cases()
    ]
    factors = [_factors(one, measured, case) for case, one in enumerate(costs)]
    seconds = [_seconds(one, factor) for one, factor in zip(costs, factors, strict=True)]
    hours = {stage: Range(*(one[stage] / 3600 for one in seconds)) for stage in STAGES}
    hours["total"] = Range(*(sum(one.values()) / 3600 for one in seconds))
    usages = [memory_bytes(one) for one in costs]
    likely = costs[1]
    rows = likely.rows.rows
    plan = Plan(
        hardware=hardware,
        architecture=architecture,
        lengths=lengths,
        hours=hours,
        tokens=likely.tokens(),
        memory={stage: Range(*(usage[stage] / 1e9 for usage in usages)) for stage in usages[0]},
        disk_gb=disk_bytes(likely) / 1e9,
        engine=engine,
        max_rows=likely.max_rows,
        live_rows=rows,
        step_milliseconds={
            "host": 1e3 * likely.host_step_seconds(rows, has_adapter=True),
            "gpu": 1e3 * likely.gpu_step_seconds(rows),
        },
        bound=_bound(hours, likely),
        faster=faster(likely, lambda changed: sum(_seconds(changed, factors[1]).values()) / 3600),
        measured=measured,
    )
    return plan, likely


def _factors(costs: StageCosts, measured: MeasuredRun | None, case: int) -> Mapping[str, float]:
    return {} if measured is None else measured.factors(costs.seconds(), costs.config, costs.num_prompts, case)


def _seconds(costs: StageCosts, factors: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of every stage, those of measured stages corrected."""
    return {stage: value * factors.get(stage, 1.0) for stage, value in costs.seconds().items()}


def _bound(hours: Mapping[str, Range], costs: StageCosts) -> str:
    """Say which stage takes most of the time, and why."""
    total = hours["total"].likely
    stage = max(STAGES, key=lambda name: hours[name].likely)
    share = hours[stage].likely / total
    text = f"{stage}, {share:.0%} of the likely time" + ("" if share >= _DOMINATES else "; no stage dominates")
    if stage != "search":
        return text
    rows = costs.rows.rows
    host, gpu = costs.host_step_seconds(rows, has_adapter=True), costs.gpu_step_seconds(rows)
    reason = "the host launches operations" if host >= gpu else "the GPU reads weights and computes"
    return f"{text}: in a step of {rows:.0f} rows {reason} for {1e3 * max(host, gpu):.0f} ms"


def _plan_warnings(plan: Plan, costs: StageCosts, out: Path) -> list[str]:
    """Warn about what would stop a run hours after it began."""
    warnings = []
    hardware = plan.hardware
    if hardware.is_cpu and plan.architecture.parameters > TOO_LARGE_FOR_A_CPU:
        warnings.append("no GPU: a model of this size takes days on a CPU; plan for a GPU with --gpu h200")
    for stage, usage in plan.memory.items() if hardware.memory else ():
        room = hardware.memory / 1e9
        # The engine measures the memory and shrinks the rows that it chose itself.
        chooses = stage == "search" and costs.config.generation.max_rows == "auto"
        if (usage.likely if chooses else usage.high) > room:
            verb = "does not fit" if usage.likely > room else "may not fit"
            remedy = _remedy(stage, costs)
            warnings.append(
                f"{stage} {verb}: {usage.low:.0f} to {usage.high:.0f} GB on a GPU with {room:.0f} GB; {remedy}"
            )
    context = plan.architecture.context
    if plan.lengths.longest > context:
        warnings.append(f"prompts of up to {plan.lengths.longest} tokens exceed the model's context of {context}")
    disk = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(disk).free / 1e9
    if plan.disk_gb > free:
        warnings.append(f"the run may write {plan.disk_gb:.0f} GB, but only {free:.0f} GB are free on this disk")
    return warnings


def _remedy(stage: str, costs: StageCosts) -> str:
    """Say which setting to change so that a stage fits."""
    if stage == "search" and (rows := fitting_rows(costs)) is not None:
        smaller = rows // 2 if rows == costs.max_rows else rows
        return f"set generation.max_rows={max(smaller, 1)}"
    if costs.config.model.quantization is None and stage != "training":
        return "set model.quantization=nf4"
    return "lower training.max_tokens or training.lora.r, or set model.quantization=nf4"
