"""Test optional parts of the report: lambda, benchmarks, runs without annotations, very large runs."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from csr_vlm.core.records import Finish, NodeStatus, Prompt
from csr_vlm.evaluation.claim_marker import doubted_tally
from csr_vlm.pipeline.stages import report as write_report
from csr_vlm.report.before_after import LESS_RELEVANT, MORE_RELEVANT, UNCHANGED, before_after, relevance_change
from csr_vlm.report.benchmark_panel import benchmark_panel
from csr_vlm.report.conclusion import conclude
from csr_vlm.report.costs import cost_table
from csr_vlm.report.evaluations import read_evaluation
from csr_vlm.report.html import render
from csr_vlm.report.lambda_panel import lambda_panel
from csr_vlm.report.limits import MAX_BYTES, Sample, shorten
from csr_vlm.report.next_steps import next_steps
from csr_vlm.store import files, tables
from csr_vlm.store.run import Run
from csr_vlm.world.truth import known_scene
from tests.unit.builders import node
from tests.unit.test_report import SCRIPT, Page, add_pairs, add_training, new_run


def write_ledger(run: Run, prompts: list[Prompt]) -> None:
    """Write two complete responses per prompt: the first fits the image, the second is more probable."""
    tables.write_prompts(run.prompts_path, prompts, 64)
    ended: dict[str, Any] = {"status": NodeStatus.FINISHED, "finish": Finish.EOS}
    nodes = [
        made
        for p in prompts
        for made in (
            node("0", "A boat.", cosine=0.4, logprobs=(-9.0,), ids=(1,), prompt_id=p.prompt_id, **ended),
            node("1", "A fish.", cosine=0.1, logprobs=(-0.1,), ids=(2,), prompt_id=p.prompt_id, **ended),
        )
    ]
    tables.write_nodes(run.iteration(1) / "ledger" / "part-000000-x.parquet", nodes)
    run.mark_done(1, "generate", nodes=len(nodes), statuses={})


PROMPTS = [Prompt(f"p{number}", "none.png", "What?") for number in range(3)]


def test_the_lambda_curve_by_hand(tmp_path: Path) -> None:
    """At 0, the more probable response is chosen; from 0.1, the more relevant one, since R_I is 100 times larger."""
    run = new_run(tmp_path / "run", world=False, preset="paper")
    write_ledger(run, PROMPTS)
    panel = lambda_panel(run, known_scene)
    assert panel is not None
    assert (panel.iteration, panel.run_lambda, panel.num_prompts) == (1, 0.9, 3)
    unchanged, wins = (str(figure.svg) for figure in panel.figures[:2])
    assert "λ = 0: 0.00; λ = 0.1: 1.00; λ = 0.3: 1.00" in unchanged
    assert "λ = 0.9: 1.00" in unchanged
    assert "λ = 0: 0.00; λ = 0.1: 1.00" in wins
    assert panel.trained_figures == []


def test_hallucination_over_lambda_on_known_scenes(tmp_path: Path) -> None:
    from csr_vlm.world.dataset import scene_of

    run = new_run(tmp_path / "run", world=False, preset="paper")
    ids = [f"harbour-prompts-0-{number:06d}" for number in range(40)]
    absent = [i for i in ids if not {"boat", "fish"} & scene_of(i)[1].kinds]
    fish = [i for i in ids if "fish" in scene_of(i)[1].kinds and "boat" not in scene_of(i)[1].kinds]
    write_ledger(run, [Prompt(i, "none.png", "What?") for i in [absent[0], fish[0]]])
    panel = lambda_panel(run, known_scene)
    assert panel is not None
    # The boat, chosen from 0.1, is in neither picture; the fish, chosen at 0, is in one of the two.
    assert "λ = 0, chosen: 0.50; λ = 0.1, chosen: 1.00" in str(panel.figures[2].svg)


@pytest.mark.parametrize(
    "changes", [{}, {"preset": "random_pairs"}, {"preset": "sentences", "scorer": {"path": "a", "name": "lost"}}]
)
def test_no_lambda_panel_without_a_ledger_scores_or_an_effect(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = new_run(tmp_path / "run", world=False, **changes)
    assert lambda_panel(run, known_scene) is None, "without a ledger"
    write_ledger(run, PROMPTS)
    assert lambda_panel(run, known_scene) is None


def test_sweeps_over_lambda_are_shown(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", world=False, preset="paper")
    write_ledger(run, PROMPTS)
    metric = {"low": 0.1, "high": 0.5, "n": 9}
    for name, override, iteration, value in (
        ("a", "method.lambda=0", 1, 0.4),
        ("b", "method.lambda=0.5", 1, 0.2),
        ("c", "method.lambda=1", 2, 0.7),
        ("d", "training.trl.beta=1", 1, 0.8),
    ):
        found = {"world": {"chair_s": metric | {"value": value}}}
        row = {"overrides": [override], "iteration": iteration, "pairs": {}, "metrics": found}
        files.write_json(run.root / "sweeps" / name / "result.json", row)
    panel = lambda_panel(run, known_scene)
    assert panel is not None
    assert [figure.label for figure in panel.trained_figures] == ["CHAIR_S"]
    assert "λ = 0: 0.400; λ = 0.5: 0.200" in str(panel.trained_figures[0].svg)
    assert "0.700" not in panel.trained_figures[0].svg, "another iteration's sweep"
    assert not any("csr sweep" in step.command for step in next_steps(run, True, panel, None))


def add_document(run: Run, iteration: int, name: str, **metrics: float) -> None:
    found = {
        key: {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 500} for key, value in metrics.items()
    }
    files.write_json(run.evaluation_path(iteration, name), {"metrics": found, "protocol": {"metric": name}, "rows": []})


def test_three_benchmarks_get_a_radar_chart(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", world=False)
    assert benchmark_panel(run) is None
    for iteration, value in ((0, 0.5), (2, 0.3)):
        add_document(run, iteration, "chair", chair_s=value, chair_i=value / 4)
    panel = benchmark_panel(run)
    assert panel is not None
    assert panel.figure is None
    assert [row.name for row in panel.table.rows] == ["base model", "iteration 2"]
    assert panel.table.rows[0].cells[0] == ("50.0", "49.0 to 51.0")
    for iteration, value in ((0, 0.85), (2, 0.86)):
        add_document(run, iteration, "pope", f1=value)
    panel = benchmark_panel(run)
    assert panel is not None
    assert panel.figure is not None
    assert panel.figure.svg.count('<polygon class="line"') == 2
    add_document(run, 2, "chair", chair_s=0.0, chair_i=0.0)
    perfect = benchmark_panel(run)
    assert perfect is not None
    assert perfect.figure is not None
    assert perfect.figure.svg.count('<polygon class="line"') == 2, "a perfect 0.0 is a measurement"
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "benchmarks" in {section.get("id") for section in page.all("section")}


def heldout_row(number: int, relevance: float, text: str = "A boat.") -> dict[str, Any]:
    tallies = {"relevance": [relevance, 1], "sentences": [1, 1], "repeats": [0, 1]}
    return {"id": f"h{number}", "text": text, "sentences": [[text, relevance]], "tallies": tallies}


def heldout_run(
    tmp_path: Path,
    before: list[float],
    after: list[float],
    evidence: dict[int, list[dict[str, float]]] | None = None,
) -> Run:
    """Write evaluations of the base model and of iteration 2: mean relevances and, if given, evidence of claims."""
    run = new_run(tmp_path / "run", world=False)
    questions = [Prompt(f"h{number}", "none.png", f"Question {number}?") for number in range(len(before))]
    tables.write_prompts(run.heldout_path, questions, 64)
    for iteration, values in ((0, before), (2, after)):
        mean = sum(values) / len(values)
        metrics = {
            name: {"value": value, "low": value - 3, "high": value + 3, "n": len(values)}
            for name, value in {"relevance": mean, "sentences": 2.0, "repeats": 0.0}.items()
        }
        rows = [heldout_row(number, value) for number, value in enumerate(values)]
        if evidence is not None:
            for row, claims in zip(rows, evidence[iteration], strict=True):
                row["evidence"], row["text"] = claims, f"There is {' and '.join(f'a {claim}' for claim in claims)}."
                row["sentences"] = [[row["text"], 20.0]]
                row["tallies"]["doubted"] = doubted_tally(claims)
            tallies = [row["tallies"]["doubted"] for row in rows]
            share = sum(doubted for doubted, _ in tallies) / sum(claims for _, claims in tallies)
            metrics["doubted"] = {"value": share, "low": 0.99964, "high": 1.0, "n": len(values)}
        files.write_json(run.evaluation_path(iteration, "heldout"), {"metrics": metrics, "protocol": {}, "rows": rows})
    return run


def test_a_run_without_annotations_compares_held_out_responses(tmp_path: Path) -> None:
    run = heldout_run(tmp_path, [20.0, 22.0, 24.0, 26.0], [23.0, 25.0, 27.0, 29.0])
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert (
        "After 2 iterations, image-text relevance (RI) of the responses to 4 held-out prompts rose from 23.0 to 26.0"
        in page.text
    )
    assert "Hallucination was not measured." in page.text
    assert "Paired difference of RI on the same prompts: +3.0" in page.text
    assert "Question 3?" in page.text
    assert sum("data-kind" in attrs for attrs in page.all("article")) == 4
    assert "not in the image" not in page.text


def test_claims_are_colored_by_their_evidence_before_and_after(tmp_path: Path) -> None:
    before = [{"boat": 3.0, "fish": -2.0}, {"boat": -1.5, "tree": -4.0}, {"boat": 2.0}]
    after = [{"boat": 3.0, "tree": 0.5}, {"boat": 2.0, "tree": 2.0}, {"boat": 2.0, "fish": -2.0}]
    run = heldout_run(tmp_path, [20.0] * 3, [20.0] * 3, {0: before, 2: after})
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert (
        "the share of claims with evidence against them in the responses to 3 held-out prompts fell from" in page.text
    )
    assert "The scorer that doubts these claims also chose the pairs" in page.text
    assert "2 fewer doubted claims, 1 more doubted claims, 0 unchanged." in page.text
    marked = Counter(attrs["class"] for attrs in page.all("span") if "nats" in attrs.get("title", ""))
    assert marked == {"claim supported": 6, "claim doubted": 4, "claim unclear": 1}
    assert "0.9996 to 1.0000" in page.text, "an interval is never 1.000 to 1.000"
    assert "image-text relevance RI" not in page.text, "no legend of sentence colors"


def test_the_costs_of_a_run_are_added_up(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", world=False)
    for number in (1, 2):
        costs = {"seconds": 1800.0, "memory_gb": 2.0 * number, "gpu_memory_gb": 30.0}
        devices = {"devices": {"NVIDIA H200": 3}, "processes": 4}
        run.mark_done(number, "generate", [], nodes=9, statuses={}, tokens=1_000, **devices, **costs)
        log = [{"step": 1, "num_tokens": 300.0}, {"step": 2, "num_tokens": 700.0}]
        run.mark_done(number, "train", [], log=log, distribution={"processes": 2}, **costs)
    table = cost_table(run)
    assert table is not None
    assert table.columns == ["Time", "Tokens", "Peak memory", "Peak GPU memory", "GPU-hours"]
    assert [(row.name, [value for value, _ in row.cells]) for row in table.rows] == [
        ("Search", ["1 h 0 min", "2,000", "4.00 GB", "30.0 GB", "4.00"]),
        ("Training", ["1 h 0 min", "1,400", "4.00 GB", "30.0 GB", "2.00"]),
        ("All", ["2 h 0 min", "–", "4.00 GB", "30.0 GB", "6.00"]),
    ]
    run.mark_done(1, "generate", [], nodes=9, statuses={}, devices={"cpu": 3}, seconds=60.0)
    run.mark_done(2, "generate", [], nodes=9, statuses={}, devices={"cpu": 3}, seconds=60.0)
    on_cpu = cost_table(run)
    assert on_cpu is not None
    assert "GPU-hours" not in on_cpu.columns
    assert on_cpu.rows[0].cells[:3] == [("2 min 0 s", ""), ("–", ""), ("–", "")]


def test_numbers_under_different_protocols_are_not_compared(tmp_path: Path) -> None:
    run = heldout_run(tmp_path, [20.0, 22.0], [28.0, 25.0])
    path = run.evaluation_path(2, "heldout")
    files.write_json(path, files.read_json(path) | {"protocol": {"max_new_tokens": 9}})
    result = conclude(run, read_evaluation(run))
    assert result.sentence == "Only the base model has been evaluated so far: R_I is 21.0."
    assert result.notes[-1] == "Excluded because of a different protocol: iteration 2."


def test_an_insignificant_change_of_relevance(tmp_path: Path) -> None:
    run = heldout_run(tmp_path, [20.0, 22.0, 24.0, 26.0], [28.0, 15.0, 27.0, 24.0])
    result = conclude(run, read_evaluation(run))
    assert result.sentence.endswith("which is not statistically significant.")
    assert result.tone == "none"


def test_responses_are_classified_by_relevance(tmp_path: Path) -> None:
    run = heldout_run(tmp_path, [20.0, 20.0, 20.0], [20.4, 25.0, 15.0])
    evaluation = read_evaluation(run)
    assert evaluation is not None
    gallery = before_after(run, evaluation, Sample(), known_scene)
    assert gallery is not None
    assert gallery.totals == {MORE_RELEVANT: 1, LESS_RELEVANT: 1, UNCHANGED: 1}
    assert [card.change for card in gallery.cards] == [MORE_RELEVANT, LESS_RELEVANT, UNCHANGED]
    assert gallery.cards[0].relevance_change == pytest.approx(5.0)
    empty = {"text": "", "tallies": {"relevance": [0.0, 0]}}
    assert relevance_change(heldout_row(0, 20.0), empty) is LESS_RELEVANT


def test_next_steps_depend_on_the_state_of_the_run(tmp_path: Path) -> None:
    run = new_run(tmp_path / "a run", world=False)
    assert [step.command for step in next_steps(run, False, None, None)] == [f"csr run '{run.root}'"]
    for iteration in (1, 2):
        add_training(run, iteration)
    commands = [step.command.split()[1] for step in next_steps(run, True, None, None)]
    assert commands == ["merge", "analyze", "eval"]


def noise(path: Path, seed: int) -> str:
    """Write an image that does not compress."""
    pixels = random.Random(seed).randbytes(200 * 200 * 3)
    Image.frombytes("RGB", (200, 200), pixels).save(path, "PNG", compress_level=0)
    return str(path)


def test_a_large_page_is_rendered_with_a_smaller_sample(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", iterations=3, world=False)
    prompts = [Prompt(f"p{number}", noise(tmp_path / f"{number}.png", number), "What? " * 99) for number in range(16)]
    for iteration in (1, 2, 3):
        add_pairs(run, iteration, prompts, f"{SCRIPT} word " * 99, "Another word. " * 500)
    everything = render(run)
    assert everything.count("<article") == 16
    size = len(everything.encode())
    assert size < MAX_BYTES < 15_000_000
    sampled = render(run, max_bytes=size // 2)
    assert len(sampled.encode()) <= size // 2
    assert 1 <= sampled.count("<article") < 16
    assert " of 16 prompts" in Page(sampled).text
    assert render(run, max_bytes=1).count("<article") == 1, "the smallest page has one item of each kind"


def test_long_texts_are_shortened() -> None:
    assert shorten("abc", 3) == "abc"
    assert shorten("abcd" * 1000 + "e") == "abcd" * 1000 + " … (1 characters omitted)"
    assert Sample(60, 24, 6).halved() == Sample(30, 12, 3)
    assert Sample(1, 1, 1).halved() == Sample(1, 1, 1)
