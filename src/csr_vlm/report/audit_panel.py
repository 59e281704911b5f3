"""The metrics of quality in the report: what was found before and after every training, and what it means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from csr_vlm.core.formatting import fixed, signed
from csr_vlm.store.run import Run
from csr_vlm.store.stage_names import GATES

_LABELS = {
    "scorer_agreement": ("The scorer tells images apart", "share of sentences that suit their own; 0.5 is chance"),
    "relevance_win": ("Chosen suits the image better", "share of pairs; 0.5 is chance"),
    "omission_gap": ("Left out of what was seen", "sentences a pair, chosen less rejected"),
    "repeat_gap": ("Said twice", "sentences a pair, chosen less rejected"),
    "length_correlation": ("Reward goes with length", "correlation over a prompt’s responses"),
    "prompts_with_pairs": ("Prompts with a pair", "share of prompts"),
    "sentences_ratio": ("Length", "sentences, as a share of the base model’s"),
    "relevance_gain": ("R_I", "change against the base model’s"),
    "repeats_gain": ("Repeats per response", "change against the base model’s"),
    "unfinished_gain": ("Responses without an end", "share, change against the base model’s"),
    "chosen_drop": ("Chosen responses became less likely", "nats, over training"),
}
_SHARES = {"scorer_agreement", "relevance_win", "prompts_with_pairs", "sentences_ratio"}


@dataclass(frozen=True)
class Judged:
    """A metric of one iteration."""

    value: str
    verdict: str
    """go, warn or stop; empty where it was not looked at."""


@dataclass(frozen=True)
class Sign:
    label: str
    meaning: str
    cells: Sequence[Judged]
    """One an iteration."""


@dataclass(frozen=True)
class Health:
    iterations: Sequence[int]
    groups: Sequence[tuple[str, Sequence[Sign]]]
    """(when it was judged, metrics)."""
    reasons: Sequence[tuple[str, str, str]]
    """(whose, warn or stop, why) of everything that is not well."""


def health_panel(run: Run) -> Health | None:
    """Gather the judgements of a run; None where there are none yet."""
    judged = {
        (stage, number): run.result(number, stage)
        for number in range(1, run.config.iterations + 1)
        for stage in GATES
        if run.is_done(number, stage)
    }
    numbers = sorted({number for _, number in judged})
    groups = []
    for stage, title in GATES.items():
        metrics = _signs([judged.get((stage, number), {}) for number in numbers])
        if metrics:
            groups.append((title, metrics))
    reasons = [reason for (stage, number), result in judged.items() for reason in _reasons(stage, number, result)]
    return Health(numbers, groups, reasons) if groups or reasons else None


def _signs(results: Sequence[Mapping[str, Any]]) -> list[Sign]:
    """Lay out the metrics that any iteration has, one row each."""
    found = [{check["metric"]: check for check in result.get("checks", [])} for result in results]
    names = dict.fromkeys(name for mine in found for name in mine)
    rows = []
    for name in names:
        label, meaning = _LABELS.get(name, (name.replace("_", " "), ""))
        rows.append(Sign(label, meaning, [_judged(name, mine.get(name)) for mine in found]))
    return rows


def _judged(name: str, check: Mapping[str, Any] | None) -> Judged:
    if check is None:
        return Judged(fixed(None), "")
    write = fixed if name in _SHARES else signed
    return Judged(write(check["value"], 2), check["verdict"])


def _reasons(stage: str, number: int, result: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield what is not well; a rule of the user's own that was broken is among the reasons only."""
    whose = f"Iteration {number}, {'pairs' if stage == 'audit' else 'policy'}"
    told = set()
    for check in result["checks"]:
        if check["verdict"] != "go":
            told.add(check["reason"])
            yield whose, check["verdict"], check["reason"]
    yield from ((whose, "stop", reason) for reason in result["reasons"] if reason not in told)
