"""Build the report's quality audit: the label-free checks before and after each training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from csr_vlm.core.formatting import UNKNOWN, fixed, signed
from csr_vlm.method.audit import TOO_FEW, shown_verdict
from csr_vlm.store.run import Run
from csr_vlm.store.stage_names import GATES

LABELS: Mapping[str, tuple[str, str]] = {
    "scorer_agreement": ("Scorer agreement", "sentences that score higher on their own image; chance: 0.5"),
    "relevance_win": ("Chosen more relevant", "pairs whose chosen response fits the image better; chance: 0.5"),
    "claim_agreement": ("Claims on their own image", "claims that score higher than on other images; chance: 0.5"),
    "nearest_agreement": ("Claims on similar images", "claims that score higher than on similar images; chance: 0.5"),
    "cue_agreement": ("Scorer and model agree", "of two claims, the more frequent one scores higher; chance: 0.5"),
    "second_win": ("Second scorer agrees", "pairs whose chosen side a second scorer prefers; chance: 0.5"),
    "omission_gap": ("Omission gap", "relevant sentences left out per pair, chosen minus rejected"),
    "repeat_gap": ("Repeat gap", "repeated sentences per pair, chosen minus rejected"),
    "length_correlation": ("Length correlation", "correlation of reward and length within a prompt"),
    "prompts_with_pairs": ("Prompts with pairs", "share of prompts"),
    "sentences_ratio": ("Length ratio", "sentences per response, relative to the base model"),
    "relevance_gain": ("Change of R_I", "relative to the base model"),
    "repeats_gain": ("Change of repeats", "per response, relative to the base model"),
    "unfinished_gain": ("Change of incomplete responses", "share of responses, relative to the base model"),
    "chosen_drop": ("Drop of chosen log-probability", "nats per response, during training"),
}
"""Metric of the audit to its label and meaning."""
_QUALITY = ("Scorer's AUC, estimated", "how well it tells true claims from false ones; chance: 0.5; not checked")
_UNSIGNED = {
    "scorer_agreement", "relevance_win", "claim_agreement", "nearest_agreement", "cue_agreement", "second_win",
    "prompts_with_pairs", "sentences_ratio",
}  # fmt: skip


@dataclass(frozen=True)
class CheckCell:
    """Represent the outcome of a check in one iteration."""

    value: str
    verdict: str
    """go, too few, warn or stop; empty if the metric was not checked."""
    n: int | None = None
    """Number of cases that the value is the mean of; None if it was not recorded."""


@dataclass(frozen=True)
class CheckRow:
    """Represent a check with one cell per iteration."""

    label: str
    meaning: str
    cells: Sequence[CheckCell]


@dataclass(frozen=True)
class Problem:
    """Represent a warning or the reason of a stop."""

    subject: str
    verdict: str
    reason: str


@dataclass(frozen=True)
class AuditPanel:
    """Hold the checks of all iterations."""

    iterations: Sequence[int]
    groups: Sequence[tuple[str, Sequence[CheckRow]]]
    """(when the checks ran, checks)."""
    problems: Sequence[Problem]

    @property
    def num_few(self) -> int:
        """Return the number of checks that passed on too few cases to tell."""
        return sum(cell.verdict == TOO_FEW for _, rows in self.groups for row in rows for cell in row.cells)


def audit_panel(run: Run) -> AuditPanel | None:
    """Gather the checks of a run; None if none has run yet."""
    results = {
        (stage, number): run.result(number, stage)
        for number in range(1, run.config.iterations + 1)
        for stage in GATES
        if run.is_done(number, stage)
    }
    numbers = sorted({number for _, number in results})
    groups = []
    for stage, title in GATES.items():
        rows = _check_rows([results.get((stage, number), {}) for number in numbers])
        if rows:
            groups.append((title, rows))
    problems = [problem for (stage, number), result in results.items() for problem in _problems(stage, number, result)]
    return AuditPanel(numbers, groups, problems) if groups or problems else None


def _check_rows(results: Sequence[Mapping[str, Any]]) -> list[CheckRow]:
    """Tabulate the metrics that any iteration has, one row each."""
    checks = [{check["metric"]: check for check in result.get("checks", [])} for result in results]
    metrics = dict.fromkeys(metric for by_metric in checks for metric in by_metric)
    rows = []
    for metric in metrics:
        label, meaning = LABELS.get(metric, (metric.replace("_", " "), ""))
        rows.append(CheckRow(label, meaning, [_cell(metric, by_metric.get(metric)) for by_metric in checks]))
    qualities = [_quality_cell(result.get("metrics", {})) for result in results]
    if any(cell.value != UNKNOWN for cell in qualities):
        rows.append(CheckRow(*_QUALITY, qualities))
    return rows


def _quality_cell(metrics: Mapping[str, float]) -> CheckCell:
    """Show the estimated AUC of the scorer beside the number of claims that it is from."""
    if "estimated_auc" not in metrics:
        return CheckCell(UNKNOWN, "")
    claims = metrics.get("claims")
    return CheckCell(fixed(metrics["estimated_auc"], 2), "", None if claims is None else int(claims))


def _cell(metric: str, check: Mapping[str, Any] | None) -> CheckCell:
    if check is None:
        return CheckCell(UNKNOWN, "")
    write = fixed if metric in _UNSIGNED else signed
    n = check.get("n")
    return CheckCell(write(check["value"], 2), shown_verdict(check["verdict"], n), n)


def _problems(stage: str, number: int, result: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield failed checks; a ``stop_if`` rule that held is only among the reasons."""
    subject = f"Iteration {number}, {'pairs' if stage == 'audit' else 'policy'}"
    reported = set()
    for check in result["checks"]:
        if check["verdict"] != "go":
            reported.add(check["reason"])
            yield Problem(subject, check["verdict"], check["reason"])
    yield from (Problem(subject, "stop", reason) for reason in result["reasons"] if reason not in reported)
