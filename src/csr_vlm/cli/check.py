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
    from csr_vlm.pipeline.estimate import Costs, Estimate
    from csr_vlm.pipeline.preflight import Preflight

_HOURS_PER_YEAR = 24 * 365.25


def check(
    target: Target,
    overrides: Overrides = None,
    out: Out = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Load no model and contact no hub; prompts may be missing.")
    ] = False,
    show_config: Annotated[
        bool, typer.Option("--config", help="Also print the resolved configuration, with the preset and all defaults.")
    ] = False,
) -> None:
    """Validate a recipe and its data, and estimate the cost.

    Tries what csr run will need: the engine, the experiment trackers, the run directory, and the model's processor on
    every prompt. If the weights are on disk, the model also generates a few sentences, the scorer scores them, and one
    training step is done.

    Example: csr check recipes/llava-1.5-7b.yaml data.limit=100
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
    from csr_vlm.pipeline.preflight import Preflight, run_preflight

    reporter = console.reporter()
    costs = estimate(config, reporter, out=root, offline=offline)
    preflight = Preflight() if offline else run_preflight(config, reporter)
    if console.mode.json:
        document = costs.dump()
        document["estimate"] |= preflight.dump()
        document["warnings"] += preflight.warnings
        console.print_json({"config": config.dump(), **document})
        return
    print_estimate(costs, preflight)
    if show_config:
        print(yaml.safe_dump(config.dump(), sort_keys=False, allow_unicode=True))
    console.log("next: csr run with the same arguments; --dry-run lists the steps first")


def print_estimate(costs: Estimate, preflight: Preflight | None = None) -> None:
    """Print an estimate and the results of a preflight as a table; warnings go to stderr."""
    rows = [["prompts", f"{costs.prompts:,}"], ["iterations", str(costs.iterations)]]
    if costs.costs is not None:
        rows += _cost_rows(costs.costs)
    if preflight is not None:
        rows += _preflight_rows(preflight)
    console.print_table("", ["estimate", ""], rows)
    for warning in [*costs.warnings, *(preflight.warnings if preflight is not None else ())]:
        print(f"warning: {warning}", file=sys.stderr)


def _cost_rows(costs: Costs) -> Iterator[list[str]]:
    yield ["parameters", _parameters(costs.parameters)]
    yield ["device", costs.device]
    yield ["weights", f"{costs.weights_gb:.1f} GB"]
    yield ["search memory", f"at most {costs.search_memory_gb:.1f} GB"]
    yield ["training memory", f"about {costs.training_memory_gb:.1f} GB"]
    yield ["disk", f"at most {costs.disk_gb:.1f} GB"]
    yield ["sentences per iteration", f"at most {costs.sentences_per_iteration:,}"]
    yield ["ledger per iteration", f"at most {costs.ledger_mb:.1f} MB"]
    for stage, hours, hours_a100 in (
        ("search", costs.search_hours, costs.search_hours_a100),
        ("claim questions", costs.question_hours, costs.question_hours_a100),
        ("training", costs.training_hours, costs.training_hours_a100),
    ):
        yield [f"{stage} per iteration", f"at most {rough_duration(hours)}, {rough_duration(hours_a100)} on an A100"]


def _preflight_rows(preflight: Preflight) -> Iterator[list[str]]:
    if preflight.log_prob_difference_nats is not None:
        yield [
            "log-probabilities, generation vs. teacher forcing",
            f"differ by {preflight.log_prob_difference_nats:.1e} nats per token",
        ]
    if preflight.scorer_agreement is not None:
        yield [f"scorer agreement on {preflight.scorer_images} images", f"{preflight.scorer_agreement:.3f}"]


def _parameters(number: int) -> str:
    """Format a number of parameters.

    Example:
        >>> _parameters(7_000_000_000), _parameters(1_234_567)
        ('7.0 B', '1.2 M')
    """
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def rough_duration(hours: float) -> str:
    """Format an order of magnitude of time.

    Example:
        >>> [rough_duration(hours) for hours in (0.001, 0.2, 5, 100, 43_800)]
        ['under 1 min', '12 min', '5 hours', '4 days', '5 years']
    """
    if hours < 1 / 60:
        return "under 1 min"
    if hours < 1:
        return f"{hours * 60:.0f} min"
    for unit, length in (("years", _HOURS_PER_YEAR), ("days", 24.0)):
        if hours >= 2 * length:
            return f"{hours / length:,.0f} {unit}"
    return f"{hours:.0f} hours" if hours >= 1.5 else "1 hour"
