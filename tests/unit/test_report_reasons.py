"""Test that the report says why a pair was chosen, what a run is about, and on how much it was measured."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from csr_vlm.config.load import resolve
from csr_vlm.core.records import Response
from csr_vlm.evaluation.statistics import Metric
from csr_vlm.method.claim_places import Level, claim_places
from csr_vlm.method.claims import claim_finder
from csr_vlm.report import audit_panel, panels
from csr_vlm.report.conclusion import subject
from csr_vlm.report.evaluations import Evaluation
from csr_vlm.report.why import ClaimReasons
from csr_vlm.store.run import Run
from tests.unit.builders import REQUIRED, node
from tests.unit.test_evidence_for_claims import said

REWARD = {"unit": "claim", "consistency": 0.0, "max_evidence": 3.0, "false_cost": 2.0, "repeat_penalty": 4.0}
CONFIG = resolve(REQUIRED | {"method": {"lambda": 1.0, "reward": REWARD, "pairs": {"min_margin": 2.0}}})
BOAT, DOG = said("0", "A boat.", {"boat": 3.0}), said("1", "A <dog>.", {"dog": -0.3})
# Two things said once each: mean z 1.35, shrunk by 2 / 3; evidence 0.9 z - 0.405.
FOR_BOAT, FOR_DOG = 2.295, -0.675


def response(end: str, reward: float) -> Response:
    return Response(end, (1,), -1.0, "", 1, reward, complete=True)


def test_a_pair_is_explained_by_the_claims_that_differ() -> None:
    reasons = ClaimReasons([BOAT, DOG], CONFIG)
    why = reasons.pair(response("0", FOR_BOAT), response("1", 2 * FOR_DOG))
    (chosen,), (rejected,) = why.chosen, why.rejected
    assert (chosen.words, chosen.level, rejected.words, rejected.level) == (
        "boat", Level.SUPPORTED, "dog", Level.UNCLEAR,
    )  # fmt: skip
    assert chosen.facts == "+2.3 nats; scorer +2.3; made by 1 of 2 sampled sentences (0.0)"
    assert rejected.facts.startswith(
        "−0.7 nats; scorer −0.7; made by 1 of 2 sampled sentences (0.0); worth −1.4, since"
    )
    assert rejected.facts.endswith("evidence against a claim counts 2 times")
    assert why.summary == (
        "The most doubtful claims decide: +2.3 against −0.7 nats, a margin of 3.0, where more than 2.0 is needed."
    )


def test_ends_repetitions_and_empty_sentences_are_named() -> None:
    end, again = node("0.0", ""), said("0.1", " A boat.", {"boat": 3.0})
    empty, dog = said("0.2", " It is nice.", {}), said("0.3", " A <dog>.", {"dog": -0.3})
    reasons = ClaimReasons([BOAT, DOG, end, again, empty, dog], CONFIG)
    summaries = [
        reasons.pair(response(side.node_id, 1.0), response("0.3", 0.0)).summary for side in (end, again, empty)
    ]
    assert summaries[0].startswith("The chosen side ends here, which is worth 0. The most doubtful claims decide: 0.0 ")
    assert summaries[0].endswith("a margin of 0.7, where more than 2.0 is needed.")
    assert summaries[1].startswith("The chosen side says again what was said before, which costs 4.0.")
    assert summaries[2].startswith("The chosen side claims nothing new that can be checked, which is worth 0.")


def test_claims_are_marked_by_their_evidence_and_escaped() -> None:
    reasons = ClaimReasons([BOAT, DOG], CONFIG)
    boat, dog = (str(reasons.sentence(side, ["dog"], in_both=False).markup) for side in (BOAT, DOG))
    assert '<span class="claim supported" title="+2.3 nats: evidence for it">boat' in boat
    assert "A &lt;<span" in dog
    assert 'class="claim unclear"' in dog
    assert '<mark class="absent"' in dog
    assert reasons.sentence(BOAT, [], in_both=True).reward == pytest.approx(FOR_BOAT)


def test_overlapping_claims_have_one_place() -> None:
    sentence = "A red fire truck and a truck."
    places = claim_places(sentence, claim_finder().find(sentence))
    assert all(left[1] <= right[0] for left, right in pairwise(places))


@pytest.mark.parametrize(
    ("trl", "meaning", "is_sigmoid"),
    [
        ({}, "training loss; dotted line: ln 2, the DPO loss without a preference", True),
        ({"loss_type": ["sigmoid"]}, "training loss; dotted line: ln 2, the DPO loss without a preference", True),
        (
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
            "training loss: sigmoid + 0.5 sft; only the sigmoid part is ln 2 without a preference",
            False,
        ),
        ({"loss_type": "ipo"}, "training loss: ipo", False),
    ],
)
def test_the_line_at_ln_2_is_drawn_for_the_sigmoid_loss_alone(trl: Any, meaning: str, is_sigmoid: bool) -> None:
    logged = {1: {"log": [{"loss": 0.7, "step": 1}, {"loss": 0.6, "step": 2}], "end": {"loss": 0.6}}}
    for key in ("rewards/accuracies", "rewards/margins"):
        logged[1]["end"][key] = None  # type: ignore[index]
    figure = panels.training_figures(logged, trl)[0]
    assert figure.meaning == meaning
    assert (panels.training_figures(logged, {})[0].svg == figure.svg) is is_sigmoid


def evaluation(name: str, n: int, **protocol: Any) -> Evaluation:
    metrics = {key: Metric(0.5, 0.4, 0.6, n) for key in ("chair_s", "chair_i", "recall", "relevance")}
    return Evaluation(name, {0: metrics, 1: metrics}, protocol, [], [])


def test_the_first_lines_say_what_was_measured(tmp_path: Path) -> None:
    run = Run(tmp_path, resolve(REQUIRED | {"data": {"prompts": "/data/coco/prompts.jsonl"}}))
    trained = "Trained on preference pairs of the model's own responses about the pictures of coco/prompts.jsonl"
    toy = subject(run, evaluation("world", 40, world="harbour", split="test"))
    assert toy.startswith(f"{trained}; measured on 40 test scenes of the toy world harbour")
    assert subject(run, evaluation("chair", 500)) == (
        f"{trained}; measured by CHAIR on captions of 500 images with annotated objects."
    )
    assert "without knowing what the images show" in subject(run, evaluation("heldout", 9))
    assert subject(run, None) == f"{trained}; not measured."
    external = replace(run, config=resolve(REQUIRED | {"data": {"prompts": "a", "pairs": "org/pairs"}}))
    assert subject(external, None) == "Trained on the preference pairs of org/pairs; not measured."


def test_a_check_of_a_handful_does_not_pass(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", resolve(REQUIRED | {"iterations": 1}))
    checks = [
        {"metric": "sentences_ratio", "value": 1.0, "verdict": verdict, "reason": "short" * (verdict != "go"), "n": n}
        for verdict, n in (("go", 2), ("go", 8), ("warn", 2))
    ]
    shown = [audit_panel._cell("sentences_ratio", check).verdict for check in checks]
    assert shown == ["too few", "go", "warn"]
    run.mark_done(1, "gate", checks=checks[:1], reasons=[], stopped=False)
    panel = audit_panel.audit_panel(run)
    assert panel is not None
    assert (panel.num_few, panel.problems) == (1, [])


def test_the_estimated_quality_of_the_scorer_names_its_claims(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", resolve(REQUIRED | {"iterations": 2}))
    check = {"metric": "cue_agreement", "value": 0.6, "verdict": "go", "reason": "", "n": 90}
    for number, metrics in ((1, {"estimated_auc": 0.784, "claims": 120.0}), (2, {})):
        run.mark_done(number, "audit", checks=[check], metrics=metrics, reasons=[], stopped=False)
    panel = audit_panel.audit_panel(run)
    assert panel is not None
    (rows,) = [rows for _, rows in panel.groups]
    assert [(cell.value, cell.n) for cell in rows[-1].cells] == [("0.78", 120), (audit_panel.UNKNOWN, None)]
