"""Implement ``csr check``: validate a recipe and its data, and estimate the cost of the run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import Out, Overrides, Target, default_out, read_settings

if TYPE_CHECKING:
    from csr_vlm.pipeline.estimate import Estimate, Plan, Range
    from csr_vlm.pipeline.preflight import Preflight

_STAGE_LABELS = {
    "checking": "check of the inputs",
    "prefill": "vision and prefill",
    "search": "search",
    "scoring": "scoring",
    "claims": "claim questions",
    "pairs": "pairs",
    "reference": "reference log-probabilities",
    "training": "training",
    "evaluation": "evaluation",
    "loading": "loading models",
    "total": "total",
}


def check(
    target: Target,
    overrides: Overrides = None,
    out: Out = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Load no model and contact no hub; prompts may be missing.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="NAME[:N]",
            help="Plan for N such GPUs: a100-80, h100, h200, 4090, or auto for this machine's. Default: this machine.",
        ),
    ] = None,
    show_config: Annotated[
        bool, typer.Option("--config", help="Also print the resolved configuration, with the preset and all defaults.")
    ] = False,
) -> None:
    """Validate a recipe and its data, and estimate the cost.

    Tries what csr run will need: the engine, the experiment trackers, the run directory, and the model's processor on
    every prompt. If the weights are on disk and fit this machine, the model also generates a few sentences, the scorer
    scores them, and one training step is done. Prints time, memory and disk of the whole run, with every assumption.

    Example: csr check recipes/llava-1.5-7b.yaml --gpu h200 data.limit=13000
    """
    import yaml

    config = read_settings(target, overrides)
    root = Path(target) if Path(target).is_dir() else out or default_out(target)
    from csr_vlm.pipeline.start import require_sources, require_writable

    require_writable(root)
    if not offline:
        require_sources(config)
    console.quiet_libraries()
    from csr_vlm.pipeline.estimate import estimate
    from csr_vlm.pipeline.hardware import parse_gpu
    from csr_vlm.pipeline.preflight import Preflight, run_preflight

    reporter = console.reporter()
    hardware = None if gpu is None else parse_gpu(gpu)
    costs = estimate(config, reporter, out=root, offline=offline, hardware=hardware, runs=runs_beside(root))
    preflight = Preflight() if offline else run_preflight(config, reporter, planned=gpu is not None)
    if console.mode.json:
        document = costs.dump()
        document["estimate"] |= preflight.dump()
        document["warnings"] += preflight.warnings
        console.print_json({"config": config.dump(), **document})
        return
    print_estimate(costs, preflight, with_assumptions=True)
    if show_config:
        print(yaml.safe_dump(config.dump(), sort_keys=False, allow_unicode=True))
    console.log("next: csr run with the same arguments; --dry-run lists the steps first")


def runs_beside(root: Path) -> list[Path]:
    """List a run directory and those beside it."""
    return [path.parent for path in root.parent.glob("*/config.yaml")]


def print_estimate(costs: Estimate, preflight: Preflight | None = None, *, with_assumptions: bool = False) -> None:
    """Print an estimate and the results of a preflight as tables; warnings and advice go to stderr."""
    rows = [["prompts", f"{costs.prompts:,}"], ["iterations", str(costs.iterations)]]
    if costs.plan is not None:
        rows += _plan_rows(costs.plan)
    if preflight is not None:
        rows += _preflight_rows(preflight)
    console.print_table("", ["estimate", ""], rows)
    if costs.plan is not None:
        console.print_table(
            f"time of {costs.iterations} iteration{'s' if costs.iterations > 1 else ''} on {costs.plan.hardware.label}",
            ["stage", "time", "likely", "tokens an iteration"],
            list(_time_rows(costs.plan)),
        )
        print(f"model: {costs.plan.architecture.source}")
        print(f"prompt lengths: {costs.plan.lengths.source}")
        if costs.plan.measured is not None:
            print(f"measured by {costs.plan.measured.root}: {', '.join(costs.plan.measured.covered)}")
        print(f"most time: {costs.plan.bound}")
        for change in costs.plan.faster:
            print(f"faster: {change}")
        if with_assumptions:
            _print_assumptions()
    for warning in [*costs.warnings, *(preflight.warnings if preflight is not None else ())]:
        print(f"warning: {warning}", file=sys.stderr)


def _plan_rows(plan: Plan) -> Iterator[list[str]]:
    yield ["parameters", _parameters(plan.architecture.parameters)]
    lengths = plan.lengths
    yield ["tokens of a prompt", f"{lengths.mean:.0f}, longest {lengths.longest}"]
    for stage, usage in plan.memory.items():
        yield [f"{stage} memory", f"{usage.low:.1f} to {usage.high:.1f} GB"]
    yield ["disk", f"{plan.disk_gb:.1f} GB"]
    yield ["engine", f"{plan.engine.name}: {plan.engine.reason}"]
    yield ["rows decoding at once", f"{plan.live_rows:.0f} on average, at most {plan.max_rows:,}"]
    host, gpu = plan.step_milliseconds["host"], plan.step_milliseconds["gpu"]
    yield [
        "decoding step",
        f"{host:.1f} ms on the host, {gpu:.1f} ms {'computing' if plan.hardware.is_cpu else 'on the GPU'}",
    ]
    if plan.measured is not None:
        yield ["measured", f"{', '.join(plan.measured.covered)} by {plan.measured.root}"]


def _time_rows(plan: Plan) -> Iterator[list[str]]:
    for stage, hours in plan.hours.items():
        tokens = plan.tokens.get(stage)
        yield [_STAGE_LABELS[stage], *time_span(hours), "" if tokens is None else f"{tokens:,.0f}"]


def _preflight_rows(preflight: Preflight) -> Iterator[list[str]]:
    if preflight.skipped is not None:
        yield ["the model was not tried", preflight.skipped]
    if preflight.log_prob_difference_nats is not None:
        yield [
            "log-probabilities, generation vs. teacher forcing",
            f"differ by {preflight.log_prob_difference_nats:.1e} nats per token",
        ]
    if preflight.scorer_agreement is not None:
        yield [f"scorer agreement on {preflight.scorer_images} images", f"{preflight.scorer_agreement:.3f}"]


def _print_assumptions() -> None:
    from csr_vlm.pipeline.assumptions import ASSUMPTIONS

    print("assumptions (low / likely / high)")
    for one in ASSUMPTIONS:
        print(f"  {one.low:g} / {one.likely:g} / {one.high:g}  {one.unit} ({one.source})")


def _parameters(number: int) -> str:
    """Format a number of parameters.

    Example:
        >>> _parameters(7_000_000_000), _parameters(1_234_567)
        ('7.0 B', '1.2 M')
    """
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def time_span(hours: Range) -> tuple[str, str]:
    """Format a range of hours in the unit that suits its likely value.

    Returns:
        The range, such as ``1.1 to 4.8 h``, and the likely value, such as ``2.1 h``.
    """
    unit, factor = next(
        ((unit, factor) for unit, factor, least in (("h", 1, 1.0), ("min", 60, 1 / 60)) if hours.likely >= least),
        ("s", 3600),
    )
    low, likely, high = (_two_digits(value * factor) for value in (hours.low, hours.likely, hours.high))
    return f"{low} to {high} {unit}", f"{likely} {unit}"


def _two_digits(value: float) -> str:
    """Format a number with two significant digits below 100, whole from there on.

    Example:
        >>> [_two_digits(value) for value in (0.0, 0.123, 2.06, 15.5, 2345.6)]
        ['0', '0.12', '2.1', '16', '2,346']
    """
    return f"{value:,.0f}" if value >= 10 or not value else f"{value:.2g}"
