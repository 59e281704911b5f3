"""Decide whether a run may continue: before training by its pairs, after training by the new policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from csr_vlm.config.schema import RunConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Reporter, Silent
from csr_vlm.evaluation.compare import (
    EvaluatedPolicy,
    compare,
    measured_metrics,
    named_metrics,
    parse_rule,
    read_documents,
    triggered_rules,
)
from csr_vlm.method import audit as quality
from csr_vlm.method.audit import Verdict
from csr_vlm.method.pairs import make_pairs
from csr_vlm.store import ledger
from csr_vlm.store.run import Run


def audit(run: Run, iteration: int, reporter: Reporter) -> bool:
    """Check an iteration's pairs before training on them.

    Returns:
        True if the run must stop: a metric is beyond its stop bound and evaluation.audit is ``stop``.

    Raises:
        CsrError: The pairs of the first iteration stop the run.
    """
    if not run.is_done(iteration, "generate"):
        return False  # offline pairs have no ledger
    if not run.is_done(iteration, "audit"):
        metrics = pair_metrics(run, iteration, run.config, reporter)
        _record(run, iteration, "audit", metrics, pair_checks(run, metrics, first_pair_metrics(run, iteration)))
    return _report_outcome(run, iteration, "audit", reporter)


def pair_checks(run: Run, metrics: Mapping[str, float], first: Mapping[str, float]) -> list[quality.Check]:
    """Check the metrics of pairs; each check knows how many pairs, or prompts, it is about."""
    numbers = {"prompts_with_pairs": run.num_prompts}
    num_pairs = int(metrics.get("pairs", 0))
    return [replace(check, n=numbers.get(check.metric, num_pairs)) for check in quality.pair_checks(metrics, first)]


def first_pair_metrics(run: Run, iteration: int) -> dict[str, float]:
    """Return the recorded pair metrics of the first iteration; empty for the first itself, and without an audit."""
    return dict(run.result(1, "audit")["metrics"]) if iteration > 1 and run.is_done(1, "audit") else {}


def pair_metrics(run: Run, iteration: int, config: RunConfig, reporter: Reporter | None = None) -> dict[str, float]:
    """Compute the quality metrics of an iteration's ledger and of the pairs that a configuration derives from it."""
    trees = []
    with (reporter or Silent()).stage(f"iteration {iteration}: checking pairs", run.num_prompts) as progress:
        for prompt, nodes in zip(run.prompts(), ledger.trees(run, iteration), strict=True):
            pairs_or_reason = make_pairs(prompt, nodes, config.method, config.scorer.used, config.seed)
            pairs = [] if isinstance(pairs_or_reason, str) else pairs_or_reason
            if nodes:
                trees.append(quality.tree_metrics(nodes, pairs, config.method, config.scorer.used))
            progress.advance(1)
    return quality.pair_metrics(trees)


def gate(run: Run, iteration: int, reporter: Reporter) -> bool:
    """Check a trained policy: its responses to held-out prompts, and the rules in evaluation.stop_if.

    Returns:
        True if the run must stop, with the previous iteration as its result.
    """
    if not run.is_done(iteration, "gate"):
        metrics, checks = response_checks(run, iteration)
        # With few responses, warn of a metric beyond its bound instead of stopping the run.
        if _num_heldout_responses(run) < quality.FEWEST:
            beyond = {check.metric for check in checks if check.verdict is Verdict.STOP and check.value is not None}
            checks = [replace(check, verdict=Verdict.WARN) if check.metric in beyond else check for check in checks]
        against = 0 if run.config.evaluation.stop_against == "base" else iteration - 1
        _record(run, iteration, "gate", metrics, checks, broken=_broken_rules(run, iteration, against), against=against)
    return _report_outcome(run, iteration, "gate", reporter)


def _num_heldout_responses(run: Run) -> int:
    return int(run.result(0, "evaluate").get("heldout", {}).get("sentences", {}).get("n", 0))


def response_checks(run: Run, iteration: int) -> tuple[dict[str, float], list[quality.Check]]:
    """Compare the policy's responses to held-out prompts with the base model's; empty if there are none.

    Returns:
        (metrics, checks). A metric that the base model has and the policy lacks is only among the checks.
    """
    base, policy = (_values(run.result(number, "evaluate").get("heldout", {})) for number in (0, iteration))
    if not base:
        return {}, []
    log = run.result(iteration, "train")["log"] if run.is_done(iteration, "train") else []
    metrics = quality.response_metrics(base, policy, _chosen_change(run, log))
    numbers = {"chosen_drop": run.result(iteration, "train").get("num_pairs")} if log else {}
    num_responses = _num_heldout_responses(run)
    found = quality.response_checks(metrics, base, policy)
    return metrics, [replace(check, n=numbers.get(check.metric, num_responses)) for check in found]


def _values(metrics: Mapping[str, Mapping[str, float | None]]) -> dict[str, float | None]:
    return {name: metric["value"] for name, metric in metrics.items()}


def check_rules(run: Run) -> None:
    """Check that the rules in evaluation.stop_if name metrics that the base model was measured by.

    Raises:
        CsrError: A rule names none, or several; found here, it costs no training.
    """
    measured = measured_metrics(read_documents(run, 0))
    for rule in run.config.evaluation.stop_if:
        named_metrics(parse_rule(rule), measured)


def _chosen_change(run: Run, log: list[dict[str, float]]) -> float | None:
    """Compute the mean of log P_policy(chosen) - log P_reference(chosen) over the last quarter of training, in nats.

    Returns:
        None if the log has no rewards or beta is 0.
    """
    rewards = [entry["rewards/chosen"] for entry in log if "rewards/chosen" in entry]
    if not rewards:
        return None
    last = rewards[-max(len(rewards) // 4, 1) :]
    beta = float(run.config.training.trl.get("beta", 0.1))
    return sum(last) / len(last) / beta if beta else None


def _broken_rules(run: Run, iteration: int, against: int) -> list[str]:
    rules = [parse_rule(rule) for rule in run.config.evaluation.stop_if]
    return (
        triggered_rules(rules, compare(EvaluatedPolicy(run, against), EvaluatedPolicy(run, iteration))) if rules else []
    )


def _record(
    run: Run,
    iteration: int,
    stage: str,
    metrics: Mapping[str, float],
    checks: list[quality.Check],
    broken: Sequence[str] = (),
    **extra: Any,
) -> None:
    """Write the marker of a gate: its metrics, checks, verdict and reasons to stop."""
    verdict = quality.worst_verdict(checks)
    stops = verdict is Verdict.STOP and run.config.evaluation.audit == "stop"
    run.mark_done(
        iteration,
        stage,
        verdict=verdict.value,
        stopped=stops or bool(broken),
        metrics=dict(metrics),
        checks=quality.dump(checks),
        reasons=[*broken, *(check.reason for check in checks if check.verdict is Verdict.STOP)],
        **extra,
    )


def _report_outcome(run: Run, iteration: int, stage: str, reporter: Reporter) -> bool:
    """Log the warnings and reasons in a gate's marker; return whether the run stops."""
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
                f"csr audit {run.root} shows all metrics; evaluation.audit=warn in a new run trains anyway",
            )
        reporter.log(f"the result is {'iteration ' + str(iteration - 1) if iteration > 1 else 'the base model'}")
    return bool(result["stopped"])
