"""Whether a run may go on: before training, by its pairs; after it, by what the policy became."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from csr_vlm.config.schema import RunConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Reporter, Silent
from csr_vlm.evaluation.compare import Measured, broken_rules, compare, parse_rule
from csr_vlm.method import audit as quality
from csr_vlm.method.audit import Verdict
from csr_vlm.method.pairs import make_pairs
from csr_vlm.store import ledger
from csr_vlm.store.run import Run

_ENOUGH = 8
"""Fewer responses to held-out prompts than this warn, and stop nothing."""


def audit(run: Run, iteration: int, reporter: Reporter) -> bool:
    """Judge an iteration's pairs before anything is trained on them.

    Returns:
        Whether the run is to stop: a metric says so, and evaluation.audit is ``stop``.
    """
    if not run.is_done(iteration, "generate"):
        return False  # pairs from outside have no ledger to look at
    if not run.is_done(iteration, "audit"):
        metrics = pair_metrics(run, iteration, run.config, reporter)
        found = quality.checks(metrics, quality.PAIR_BOUNDS)
        _conclude(run, iteration, "audit", metrics, found)
    return _announce(run, iteration, "audit", reporter)


def pair_metrics(run: Run, iteration: int, config: RunConfig, reporter: Reporter | None = None) -> dict[str, float]:
    """Compute the metrics of an iteration's ledger and of the pairs that a configuration makes of it."""
    trees = []
    found = zip(run.prompts(), ledger.trees(run, iteration), strict=True)
    with (reporter or Silent()).stage(f"iteration {iteration}: judging pairs", run.num_prompts) as progress:
        for prompt, nodes in found:
            pairs = make_pairs(prompt, nodes, config.method, config.scorer.used, config.seed)
            made = [] if isinstance(pairs, str) else pairs
            trees.append(quality.tree_metrics(nodes, made, config.method, config.scorer.used))
            progress.advance(1)
    return quality.pair_metrics(trees)


def gate(run: Run, iteration: int, reporter: Reporter) -> bool:
    """Judge a trained policy: by its responses to held-out prompts, and by evaluation.stop_if.

    Returns:
        Whether the run is to stop, with the iteration before as its result.
    """
    if not run.is_done(iteration, "gate"):
        metrics = response_metrics(run, iteration)
        found = quality.checks(metrics, quality.RESPONSE_BOUNDS)
        if _num_answers(run) < _ENOUGH:
            found = [replace(f, verdict=Verdict.WARN) if f.verdict is Verdict.STOP else f for f in found]
        against = 0 if run.config.evaluation.stop_against == "base" else iteration - 1
        _conclude(run, iteration, "gate", metrics, found, broken=_broken(run, iteration, against), against=against)
    return _announce(run, iteration, "gate", reporter)


def _num_answers(run: Run) -> int:
    return int(run.result(0, "evaluate").get("heldout", {}).get("sentences", {}).get("n", 0))


def response_metrics(run: Run, iteration: int) -> dict[str, float]:
    """Compare the policy's responses to held-out prompts with the base model's; empty without any."""
    base, now = (run.result(number, "evaluate").get("heldout") for number in (0, iteration))
    if not base or not now:
        return {}
    log = run.result(iteration, "train")["log"] if run.is_done(iteration, "train") else []
    return quality.response_metrics(_values(base), _values(now), _chosen_change(run, log))


def _values(metrics: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    return {name: metric["value"] or 0.0 for name, metric in metrics.items()}


def _chosen_change(run: Run, log: list[dict[str, float]]) -> float | None:
    """Mean change of log P(chosen) against the reference over the last quarter of the training, in nats."""
    rewards = [entry["rewards/chosen"] for entry in log if "rewards/chosen" in entry]
    if not rewards:
        return None
    last = rewards[-max(len(rewards) // 4, 1) :]
    beta = float(run.config.training.trl.get("beta", 0.1))
    return sum(last) / len(last) / beta if beta else None


def _broken(run: Run, iteration: int, against: int) -> list[str]:
    rules = [parse_rule(rule) for rule in run.config.evaluation.stop_if]
    return broken_rules(rules, compare(Measured(run, against), Measured(run, iteration))) if rules else []


def _conclude(
    run: Run,
    iteration: int,
    stage: str,
    metrics: Mapping[str, float],
    found: list[quality.Check],
    broken: Sequence[str] = (),
    **more: Any,
) -> None:
    verdict = quality.worst_verdict(found)
    stops = verdict is Verdict.STOP and run.config.evaluation.audit == "stop"
    run.mark_done(
        iteration,
        stage,
        verdict=verdict.value,
        stopped=stops or bool(broken),
        metrics=dict(metrics),
        checks=quality.dump(found),
        reasons=[*broken, *(f.reason for f in found if f.verdict is Verdict.STOP)],
        **more,
    )


def _announce(run: Run, iteration: int, stage: str, reporter: Reporter) -> bool:
    result: dict[str, Any] = run.result(iteration, stage)
    if run.config.evaluation.audit != "off":
        for check in result["checks"]:
            if check["verdict"] != Verdict.GO.value and not result["stopped"]:
                reporter.log(f"iteration {iteration}: warning: {check['reason']}")
    if result["stopped"]:
        for reason in result["reasons"]:
            reporter.log(f"iteration {iteration}: stopped: {reason}")
        if iteration == 1 and stage == "audit":
            raise CsrError(
                f"these pairs are not worth training on: {'; '.join(result['reasons'])}",
                f"csr audit {run.root} shows all metrics; a new run with evaluation.audit=warn trains all the same",
            )
        reporter.log(f"the result is {'iteration ' + str(iteration - 1) if iteration > 1 else 'the base model'}")
    return bool(result["stopped"])
