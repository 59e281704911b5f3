"""Render what ``csr validate-scorer`` measured as one self-contained HTML page, and its picture as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from csr_vlm.core.formatting import interval, plural
from csr_vlm.evaluation.auc_intervals import Auc
from csr_vlm.evaluation.reward_placement import Placement
from csr_vlm.evaluation.scorer_validation import Contrasts, ScoredCaptions, ScorerPair, ScorerResult, Separation
from csr_vlm.evaluation.scorer_verdict import GOOD, WEAK, Verdict
from csr_vlm.evaluation.sentence_kinds import KINDS
from csr_vlm.report.distributions import Row, distribution_chart
from csr_vlm.report.html import render_page
from csr_vlm.report.number_table import NumberTable, TableRow

_NO_CELL = ("–", "")


@dataclass(frozen=True)
class Validation:
    """Hold everything that the page shows."""

    scored: ScoredCaptions
    results: tuple[ScorerResult, ...]
    """One per scorer; with several, also that of their mean."""
    placements: Mapping[str, Placement]
    verdicts: Mapping[str, Verdict]
    pairs: tuple[ScorerPair, ...]
    preset: str
    notes: Sequence[str] = ()
    protocol: Mapping[str, Any] = field(default_factory=dict)


def render_validation(validation: Validation) -> str:
    """Return the page."""
    return render_page(
        "scorer_validation.html.j2",
        validation=validation,
        good=GOOD,
        weak=WEAK,
        num_pictures=len(validation.scored.captions.pictures),
        sections=[_section(validation, result) for result in validation.results],
    )


def _section(validation: Validation, result: ScorerResult) -> dict[str, Any]:
    return {
        "name": result.name,
        "verdict": validation.verdicts.get(result.name),
        "placement": validation.placements[result.name],
        "charts": [
            ("Sentences", scorer_picture(validation, result, "sentences")),
            ("Claims", scorer_picture(validation, result, "claims")),
        ],
        "tables": [
            _table("By sentence", result.sentences, result.mood),
            _table("By claim (“a photo of a fork”)", result.claims),
            _margin_table(validation.placements[result.name]),
        ],
    }


def scorer_picture(validation: Validation, result: ScorerResult, of: str, standalone: bool = False) -> Markup:
    """Draw the contrasts of true and false sentences or claims by kind, as an ``svg`` element."""
    texts, values = validation.scored.texts(of), validation.scored.contrasts(result.name, of)
    groups = result.sentences if of == "sentences" else result.claims
    aucs = {one.group.removeprefix("in "): one.auc for one in groups}

    def sides(kinds: Sequence[str]) -> tuple[list[float], list[float]]:
        chosen = [(t, v) for t, v in zip(texts, values, strict=True) if t.kind in kinds and t.truth is not None]
        return [v for t, v in chosen if t.truth == "grounded"], [v for t, v in chosen if t.truth != "grounded"]

    def row(name: str, kinds: Sequence[str], key: str) -> Row:
        true, false = sides(kinds)
        auc = aucs.get(key)
        return Row(name, true, false, "" if auc is None else f"AUC {auc.value:.2f}")

    whole = [row("all claims", KINDS, "claims")] if of == "claims" else []
    names = [kind for kind in KINDS if kind != "mood"]
    rows = [*whole, *(row({"item": "list item"}.get(kind, kind), [kind], kind) for kind in names)]
    mood = [v for t, v in zip(texts, values, strict=True) if t.kind == "mood"]
    if of == "sentences" and mood:
        rows.append(Row("mood", mood, [], "names nothing", plural(len(mood), "sentence")))
    line = validation.placements[result.name].zero_line if of == "sentences" else None
    description = f"Contrasts of true and false {of} by kind, scorer {result.name}"
    title = "contrast: cosine minus mean cosine with other pictures"
    return distribution_chart(description, rows, title, line, standalone)


def _table(title: str, groups: Sequence[Separation], mood: Contrasts | None = None) -> NumberTable:
    rows = [
        TableRow(
            one.group,
            [_auc_cell(one.auc), _contrast_cell(one.true), _contrast_cell(one.false), (f"{one.true.n}", ""),
             (f"{one.false.n}", "")],
        )
        for one in groups
        if one.true.n or one.false.n
    ]  # fmt: skip
    if mood is not None and mood.n:
        rows.append(
            TableRow("mood (names nothing)", [_NO_CELL, _contrast_cell(mood), _NO_CELL, (f"{mood.n}", ""), _NO_CELL])
        )
    columns = ["AUC", "contrast, true", "contrast, false", "true", "false"]
    return NumberTable(
        title, "Group", columns, rows, "AUC with its 95 % interval over pictures; contrasts: mean and sd."
    )


def _auc_cell(auc: Auc | None) -> tuple[str, str]:
    return _NO_CELL if auc is None else (f"{auc.value:.3f}", interval(auc.low, auc.high, 2))


def _contrast_cell(contrasts: Contrasts) -> tuple[str, str]:
    if contrasts.mean is None:
        return _NO_CELL
    return f"{contrasts.mean:.3f}".replace("-", "−"), "" if contrasts.sd is None else f"sd {contrasts.sd:.3f}"


def _margin_table(placement: Placement) -> NumberTable:
    rows = [
        TableRow(
            f"{one.min_margin:g}{' (preset)' if index == 0 else ''}",
            [
                (str(number), "")
                for number in (one.right, one.wrong, one.undecided, one.end_over_true, one.end_over_false)
            ],
            highlighted=index == 0,
        )
        for index, one in enumerate(placement.margins)
    ]
    columns = ["right", "wrong", "undecided", "END > true", "END > false"]
    note = "Pairs of a true and a false detail of one picture, and details to which ending the response is preferred."
    return NumberTable("Decisions by method.pairs.min_margin", "Margin", columns, rows, note)
