"""Repeat the paper's ablation on a user's own model: parts of the reward, values of lambda, presets.

Every variant is one training more, or one run more. One ledger serves a variant only where the variant would
have generated the same: in a single iteration, with the same search, which the reward must not have steered.
Any other variant gets a run of its own, below the same directory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csr_vlm.config.schema import RunConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Reporter
from csr_vlm.evaluation.compare import read_documents
from csr_vlm.pipeline.estimate import Estimate, plan_of_variant
from csr_vlm.pipeline.loop import align
from csr_vlm.pipeline.sweep import changed_ledger_key, train_on_ledger
from csr_vlm.store import files
from csr_vlm.store.run import Run, differences

BOTH = "both"
"""Name of the recipe itself, in whose run the base model is evaluated too."""
_WITHOUT_REWARD = ("logprob", "sentence_logprobs")
"""Values of ``method.search.steer_by`` with which the search depends on no reward."""
_STEERING = ("method.lambda", "method.reward", "method.claims", "scorer")
"""Settings that the search depends on where the reward steers it."""
_SHARED_STAGES = ("pairs", "reference", "training", "evaluation", "loading")
"""Stages that a variant on a shared ledger still needs."""
_ONLY_R_T = ("method.lambda=0.0", "method.pairs.questions.per_prompt=0")
"""Without R_I no answer to a question is known to be right."""
_ONLY_R_I = ("method.lambda=1.0",)


@dataclass(frozen=True)
class Variant:
    """Represent one row of an ablation."""

    name: str
    overrides: tuple[str, ...]
    """What it changes in the recipe."""
    config: RunConfig
    own_run: str | None
    """Why it needs a run of its own; None if the recipe's ledger serves it."""
    hours: float | None
    """Likely cost; None if it cannot be estimated."""


def variants(
    load: Callable[[Sequence[str]], RunConfig],
    lambdas: Sequence[float],
    presets: Sequence[str],
    costs: Estimate | None = None,
) -> list[Variant]:
    """List the variants: the recipe, one part of its reward, values of lambda, and presets.

    Args:
        load: Loads the recipe with further overrides.
        costs: Estimate of the recipe itself.

    Raises:
        CsrError: A value or a preset is not valid.
    """
    recipe = load(())
    # Without R_I there are no claims: the preset only_rt rates sentences.
    only_rt = ("preset=only_rt", *_ONLY_R_T) if recipe.method.reward.unit == "claim" else _ONLY_R_T
    changes: dict[str, tuple[str, ...]] = {BOTH: (), "only R_T": only_rt, "only R_I": _ONLY_R_I}
    changes |= {f"lambda {value:g}": (f"method.lambda={value}",) for value in lambdas}
    changes |= {f"preset {name}": (f"preset={name}",) for name in presets}
    found = []
    for name, overrides in changes.items():
        config = load(overrides)
        if name != BOTH and config.dump() == recipe.dump():
            continue  # the recipe itself
        reason = None if name == BOTH else needs_own_run(recipe, config)
        shared = name != BOTH and reason is None
        found.append(Variant(name, overrides, config, reason, _hours(costs, config, shared)))
    return found


def needs_own_run(recipe: RunConfig, variant: RunConfig) -> str | None:
    """Return why the recipe's ledger is not the variant's; None if it is.

    A ledger is the same if nothing that the search depends on differs. In later iterations it
    never is: the policy that generates it was trained on the variant's own pairs.
    """
    if recipe.iterations > 1 or variant.iterations > 1:
        return "each iteration generates with its own policy"
    if (key := changed_ledger_key(recipe, variant)) is not None:
        return f"{key} determines the ledger"
    if recipe.method.search.steer_by not in _WITHOUT_REWARD:
        changed = [key for key in differences(recipe.dump(), variant.dump()) if key.startswith(_STEERING)]
        if changed:
            return f"{changed[0]} steers the search"
    return None


def _hours(costs: Estimate | None, config: RunConfig, shared: bool) -> float | None:
    plan = None if costs is None else plan_of_variant(costs, config)
    if plan is None:
        return None
    stages = [stage for stage in plan.hours if stage in _SHARED_STAGES] if shared else ["total"]
    return sum(plan.hours[stage].likely for stage in stages)


def ablate(found: Sequence[Variant], out: Path, reporter: Reporter) -> list[dict[str, Any]]:
    """Train and evaluate every variant; what is finished is kept.

    A variant that cannot be trained, such as one without pairs, gets its reason in place of metrics, and
    the others go on.

    Args:
        found: From :func:`variants`, the recipe first.
        out: Directory of the runs and of ``ablation.json``.

    Returns:
        One row per policy, the base model first: ``name``, ``run``, ``metrics`` by evaluation, ``failed``.
    """
    rows: list[dict[str, Any]] = []
    recipe = Run.create(out / BOTH, found[0].config)
    for variant in found:
        reporter.log(f"{variant.name}: {'the recipe' if variant.name == BOTH else ' '.join(variant.overrides)}")
        try:
            metrics = _measure(variant, recipe, out, reporter)
            failed = None
        except CsrError as error:
            if variant.name == BOTH:
                raise
            metrics, failed = {}, error.message
            reporter.log(f"{variant.name} was not trained: {error.message}")
        if variant.name == BOTH:
            rows.append({"name": "base", "run": str(recipe.root), "metrics": _metrics(recipe, 0), "failed": None})
        rows.append(
            {
                "name": variant.name,
                "overrides": list(variant.overrides),
                "run": str(_root(variant, out)),
                "own_run": variant.own_run,
                "metrics": metrics,
                "failed": failed,
            }
        )
        files.write_json(out / "ablation.json", {"variants": rows})
    return rows


def _root(variant: Variant, out: Path) -> Path:
    return out / variant.name.replace(" ", "-").replace("_", "").lower()


def _measure(variant: Variant, recipe: Run, out: Path, reporter: Reporter) -> dict[str, Any]:
    root = _root(variant, out)
    if variant.name != BOTH and variant.own_run is None:
        with recipe.locked():
            metrics: dict[str, Any] = train_on_ledger(recipe, variant.config, variant.overrides, 1, root, reporter)[
                "metrics"
            ]
            return metrics
    run = recipe if variant.name == BOTH else Run.create(root, variant.config)
    align(run, reporter)
    return _metrics(run, run.final)


def _metrics(run: Run, iteration: int) -> dict[str, Any]:
    return {name: document["metrics"] for name, document in read_documents(run, iteration).items()}
