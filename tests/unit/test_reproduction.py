"""Test the paper's tables, the runs' numbers next to them, and the page that shows both."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from csr_vlm.cli.app import app
from csr_vlm.config.load import resolve
from csr_vlm.evaluation.reproduction import collect_results, departures, protocol_fields, published, with_lambda
from csr_vlm.report.radar import HEIGHT, RADIUS, WIDTH, RadarSeries, Spoke, radar, radial_position
from csr_vlm.report.reproduction_page import render
from csr_vlm.store import files
from csr_vlm.store.run import Run
from tests.unit.builders import REQUIRED
from tests.unit.test_report import Page


def new_run(root: Path, measured: dict[int, dict[str, dict[str, float]]], **settings: Any) -> Run:
    """Create a run with {iteration: {evaluation: {metric: value}}}, each with an interval of ±0.01."""
    run = Run.create(root, resolve(REQUIRED | {"iterations": 3} | settings))
    for number, documents in measured.items():
        for name, metrics in documents.items():
            found = {key: {"value": v, "low": v - 0.01, "high": v + 0.01, "n": 500} for key, v in metrics.items()}
            protocol = {"world": "harbour"} if name == "world" else {"max_new_tokens": 512}
            files.write_json(run.evaluation_path(number, name), {"metrics": found, "protocol": protocol, "rows": []})
        if number:
            run.mark_done(number, "train")
            run.mark_done(number, "pairs", chosen_reward=40.0 + number, rejected_reward=20.0)
    return run


def test_every_published_row_has_one_value_per_column():
    tables = published()
    for table in (*tables.main, tables.iterations, tables.lambdas, tables.ablation):
        assert all(len(values) == len(table.columns) for values in table.rows.values())
    for table in (*tables.main, tables.iterations, tables.lambdas):
        assert set(table.columns) <= tables.benchmarks.keys()


def test_the_tables_agree_where_they_overlap():
    """Compare tables that repeat a number, where a transcription error would show."""
    tables = published()
    main = tables.main[0]
    for row, number in (("base", 0), ("CSR (3)", 3)):
        ours = dict(zip(main.columns, main.rows[row], strict=True))
        theirs = dict(zip(tables.iterations.columns, tables.iterations.rows[number], strict=True))
        assert (ours["chair_s"], ours["chair_i"]) == (theirs["chair_s"], theirs["chair_i"])
        assert ours["pope"] == theirs["pope_accuracy"]
    best = dict(zip(tables.lambdas.columns, tables.lambdas.rows[0.9], strict=True))
    assert all(dict(zip(main.columns, main.rows["CSR (3)"], strict=True))[key] == value for key, value in best.items())


def test_the_page_states_that_the_numbers_are_a_transcription(tmp_path):
    assert "third-hand transcription" in render([new_run(tmp_path, {})])


@pytest.mark.parametrize(
    ("path", "model"),
    [("llava-hf/llava-1.5-7b-hf", "LLaVA-1.5-7B"), ("x/LLaVA-1.5-13B", "LLaVA-1.5-13B"), ("VILA-7b", "VILA-7B")],
)
def test_the_table_follows_the_model(path, model):
    assert published().main_table(path).model == model


def test_results_are_converted_to_the_papers_units(tmp_path):
    run = new_run(tmp_path, {0: {"chair": {"chair_s": 0.5}, "lmms": {"mme_p": 1510.0, "gqa": 0.62}}})
    found = collect_results(run).by_iteration[0]
    assert found["chair_s"].metric.value == pytest.approx(50.0)
    assert found["chair_s"].metric.low == pytest.approx(49.0)
    assert found["mme_p"].metric.value == 1510.0
    assert found["gqa"].metric.value == pytest.approx(62.0)
    assert "chair_i" not in found


def test_results_on_coco_take_precedence_and_those_on_drawn_scenes_are_marked(tmp_path):
    both = new_run(tmp_path / "a", {0: {"chair": {"chair_s": 0.5}, "world": {"chair_s": 0.4}}})
    assert collect_results(both).by_iteration[0]["chair_s"].metric.value == pytest.approx(50.0)
    only = new_run(tmp_path / "b", {0: {"world": {"chair_s": 0.4}}})
    found = collect_results(only).by_iteration[0]["chair_s"]
    assert not found.same_data
    fields = {f.name: (f.paper, f.own) for f in protocol_fields(published().benchmarks["chair_s"], found)}
    assert fields["data"] == ("COCO images", "drawn scenes of the embedded world harbour")
    assert fields["max_new_tokens"] == (None, None)
    text = Page(render([only])).text
    assert "40.0 †" in text
    assert "not the paper's numbers" in text


def test_other_data_of_the_same_name_stand_apart(tmp_path):
    """SEED's images and VizWiz's validation split are not the paper's SEED and VizWiz, also in a run of version 0.1."""
    new = new_run(tmp_path / "new", {0: {"lmms": {"seed_image": 0.68, "vizwiz_val": 0.5}}})
    old = new_run(tmp_path / "old", {0: {"lmms": {"seed": 0.68, "vizwiz": 0.5}}})
    for run in (new, old):
        found = collect_results(run).by_iteration[0]
        assert found.keys() == {"seed_image", "vizwiz_val"}
        page = Page(render([run]))
        assert re.search(rf"{run.root.name}, base model\s*68\.067\.0 to 69\.0\s*50\.0", page.text)
        assert "Measured apart" in page.text
        assert "has been evaluated on 0 of" not in page.text
    assert "Measured apart" not in render([new_run(tmp_path / "none", {})])


def test_pope_shows_accuracy_and_f1_where_the_paper_leaves_open_which_it_is(tmp_path):
    run = new_run(tmp_path, {0: {"pope": {"mean_accuracy": 0.86, "mean_f1": 0.84}}})
    text = Page(render([run])).text
    assert "accuracy 86.0, F1 84.0" in text
    assert "evaluated on 1 of the paper's 12 benchmarks" in text


def test_a_number_under_another_protocol_is_marked_and_not_drawn(tmp_path):
    run = new_run(tmp_path / "judged", {0: {"lmms": {"mm_vet": 30.0, "gqa": 0.62}}})
    html = render([run])
    assert "30.0 ‡" in html
    assert "62.0 ‡" not in html
    assert "think step by step" in html
    series = html.split("<title>judged</title>")[1].split("</g>")[0]
    assert series.count("<circle") == 1, "GQA, but not MM-Vet"


def test_a_perfect_chair_keeps_its_spoke(tmp_path):
    run = new_run(tmp_path / "perfect", {0: {"chair": {"chair_s": 0.0, "chair_i": 0.0}}})
    series = render([run]).split("<title>perfect</title>")[1].split("</g>")[0]
    assert series.count("<circle") == 2


def test_every_quoted_number_has_a_source_and_says_whether_it_was_read():
    table = published().hallucination
    assert set(table.columns) <= published().benchmarks.keys()
    for row in table.rows:
        assert set(row.values) <= set(table.columns)
        assert row.source
        assert row.protocol
        assert row.status in ("read", "unread")
    (row,) = [row for row in table.rows if row.name == "HA-DPO" and row.status == "read"]
    # The means of the three settings in its README: random, popular, adversarial.
    assert row.values["pope_accuracy"] == pytest.approx((90.53 + 87.90 + 81.46) / 3, abs=0.005)
    assert row.values["pope_f1"] == pytest.approx((90.25 + 87.81 + 82.54) / 3, abs=0.005)


def test_quoted_numbers_stand_beside_the_runs(tmp_path):
    measured = {"mmhal": {"mmhal_score": 2.5}, "hallusion": {"hallusion_a_acc": 0.48}}
    page = Page(render([new_run(tmp_path / "mine", {0: measured})]))
    assert "RLAIF-Vreading notes on table 1 of SENTINEL, arXiv 2507.12455; not stated in the notes; unread" in page.text
    assert "48.0 ‡" in page.text
    assert "mDPO, OPA-DPO, TPR, IRIS and AVES-DPO" in page.text


def test_departures_are_limited_to_settings_of_the_method(tmp_path):
    paper = new_run(tmp_path / "paper", {}, preset="paper", seed=7)
    assert departures(paper) == []
    ours = {key: (theirs, own) for key, theirs, own in departures(new_run(tmp_path / "ours", {}))}
    assert ours["method.reward.text_score"] == ("product", "mean_logprob")
    assert ours["training.trl.learning_rate"] == (1e-7, 5e-6)
    assert not any(key.startswith(("model", "data", "seed")) for key in ours)


def test_runs_are_added_to_the_tables_of_lambda_and_ablation(tmp_path):
    measured = {0: {"chair": {"chair_s": 0.5}}, 3: {"chair": {"chair_s": 0.3, "chair_i": 0.1}}}
    runs = [
        new_run(tmp_path / "half", measured, method={"lambda": 0.5}),
        new_run(tmp_path / "rt", measured, preset="only_rt"),
        new_run(tmp_path / "control", measured, preset="random_pairs"),
    ]
    found = [collect_results(run) for run in runs]
    assert [item.run.root.name for item in with_lambda(found, 0.5)] == ["half"]
    assert [item.run.root.name for item in with_lambda(found, 0.0)] == ["rt"]
    assert with_lambda(found, 0.9) == [], "random pairs follow no lambda"
    text = Page(render(runs)).text
    assert "half, λ = 0.5" in text
    assert re.search(r"rt, only RT\s*––30.0", text.replace("\n", ""))


def test_rewards_are_averaged(tmp_path):
    run = new_run(tmp_path, {0: {}, 1: {}, 2: {}})
    assert collect_results(run).rewards == {
        1: {"chosen": 41.0, "rejected": 20.0, "average": 30.5},
        2: {"chosen": 42.0, "rejected": 20.0, "average": 31.0},
    }


def test_the_page_is_self_contained(tmp_path):
    run = new_run(tmp_path / "run <b>", {0: {"chair": {"chair_s": 0.5, "chair_i": 0.1}}})
    html = render([run])
    page = Page(html)
    assert "run <b>" in page.text, "escaped, so that it reads as it is"
    assert not page.all("script")
    assert not re.search(r"(src|href)=\"(?!#)", html)


def test_values_are_placed_between_the_worst_and_the_best():
    assert radial_position(48.8, (48.8, 21.0)) == pytest.approx(0.2), "lower is better: the largest is the worst"
    assert radial_position(21.0, (48.8, 21.0)) == pytest.approx(1.0)
    assert radial_position(34.9, (48.8, 21.0)) == pytest.approx(0.6)
    assert radial_position(5.0, (5.0, 5.0)) == 1.0


def test_the_radar_puts_the_best_at_the_rim():
    spokes = [Spoke("A"), Spoke("B", lower_is_better=True), Spoke("C")]
    drawn = radar("d", spokes, [RadarSeries("one", [1.0, 2.0, 3.0]), RadarSeries("two", [2.0, 1.0, 3.0])])
    outlines = [
        [tuple(map(float, place.split(","))) for place in points.split()]
        for points in re.findall(r'class="line" points="([^"]*)"', drawn)
    ]
    distances = [[math.hypot(x - WIDTH / 2, y - HEIGHT / 2) for x, y in outline] for outline in outlines]
    assert distances[0] == pytest.approx([0.2 * RADIUS, 0.2 * RADIUS, RADIUS], abs=0.1)
    assert distances[1] == pytest.approx([RADIUS] * 3, abs=0.1)
    assert radar("d", spokes[:2], []) == ""
    partial = radar("d", spokes, [RadarSeries("one", [1.0, None, 3.0])])
    assert 'class="line"' not in partial, "no outline through missing values"
    assert partial.count("<circle") == 2


def test_the_command_writes_into_the_run_by_default(tmp_path):
    run = new_run(tmp_path, {0: {"chair": {"chair_s": 0.5}}})
    shown = CliRunner().invoke(app, ["reproduce", str(run.root)])
    assert shown.stdout.strip() == str(tmp_path / "reproduction.html")
    assert (tmp_path / "reproduction.html").stat().st_size > 10_000
