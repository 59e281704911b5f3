"""Test attention to the image and separability of pairs on numbers that can be checked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from csr_vlm.config.load import resolve
from csr_vlm.core.batching import evenly_spaced
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Silent
from csr_vlm.evaluation.attention import ResponseAttention, attention_sinks, compare_attention, tallies
from csr_vlm.evaluation.introspection import analyze, relevance
from csr_vlm.evaluation.separability import PairLogprobs, implicit_reward, separability
from csr_vlm.evaluation.statistics import auc_metric
from csr_vlm.report.html import render
from csr_vlm.store import files
from csr_vlm.store.run import Run
from tests.unit.builders import REQUIRED
from tests.unit.test_report import Page, row

HEADING = "Changes inside the model"
# A prompt of four positions, the second and third being the image, and two response tokens: the
# row that predicts the first sees four positions, the second one's sees five.
IMAGE = torch.tensor([False, True, True, False, False])
FIRST, SECOND = [0.10, 0.30, 0.30, 0.30, 0.0], [0.10, 0.10, 0.20, 0.30, 0.30]


def attention(*rows: list[float]) -> ResponseAttention:
    return ResponseAttention(torch.tensor([list(rows)]), IMAGE, start=4)


def test_views_by_hand():
    item = attention(FIRST, SECOND)
    found = tallies(item, torch.tensor([[True, False, False, False, False]]))
    # The image gets 0.6 and 0.3; uniform attention would give it 2/4 and 2/5.
    assert found["mass"] == [(pytest.approx(0.9), 2.0)]
    assert found["relative"] == [(pytest.approx(0.6 / 0.5 + 0.3 / 0.4), 2.0)]
    # Without the first position 0.6 / 0.9 and 0.3 / 0.9; uniform 2/3 and 2/4.
    assert found["beyond_sinks"] == [(pytest.approx(1.0 + (1 / 3) / 0.5), 2.0)]


def test_uniform_attention_is_one_at_any_length():
    uniform = attention([0.25, 0.25, 0.25, 0.25, 0.0], [0.2] * 5)
    found = tallies(uniform, torch.tensor([[True, False, False, False, False]]))
    assert found["relative"][0][0] / 2 == pytest.approx(1.0)
    assert found["beyond_sinks"][0][0] / 2 == pytest.approx(1.0)


def test_sinks_are_those_of_either_policy_and_the_first_position():
    one = attention([0.0, 0.1, 0.1, 0.8, 0.0], [0.0, 0.1, 0.1, 0.2, 0.6])  # position 3: 0.5, position 4: 0.3
    other = attention([0.0, 0.9, 0.1, 0.0, 0.0], [0.0, 0.1, 0.9, 0.0, 0.0])  # positions 1 and 2: 0.5
    assert attention_sinks([one]).tolist() == [[True, False, False, True, True]]
    assert attention_sinks([one, other]).tolist() == [[True] * 5]


def test_a_growing_sink_is_not_mistaken_for_less_attention_to_the_image():
    """The first position takes half of every weight; the ratios between the others are unchanged."""
    halved = [[0.5 * weight for weight in line] for line in (FIRST, SECOND)]
    before, after = attention(FIRST, SECOND), attention(*([line[0] + 0.5, *line[1:]] for line in halved))
    (found,) = compare_attention([before] * 3, [after] * 3)
    assert found["mass"].value == pytest.approx(-0.225)
    assert found["beyond_sinks"].value == pytest.approx(0.0, abs=1e-6)
    assert found["mass"].n == 3


def test_separability_by_hand():
    found = separability([-0.1, -0.5, -0.4], [-0.3, -0.2, -0.4])
    assert found["margin"]["value"] == pytest.approx((0.2 - 0.3 + 0.0) / 3)
    assert found["preferred"]["value"] == pytest.approx(1.5 / 3), "equal ones count half"
    # -0.1 beats all three; -0.5 none; -0.4 meets its equal.
    assert found["auc"]["value"] == pytest.approx(3.5 / 9)


def test_the_interval_of_an_auc_contains_the_true_value():
    rng = np.random.default_rng(0)
    apart = auc_metric(rng.normal(1.0, 1, 300).tolist(), rng.normal(0.0, 1, 300).tolist())
    assert apart.low < 0.760 < apart.high, "P(N(1, 2) > 0) = 0.760"
    assert apart.high - apart.low < 0.1
    same = auc_metric(rng.normal(0, 1, 300).tolist(), rng.normal(0, 1, 300).tolist())
    assert same.low < 0.5 < same.high


def test_the_implicit_reward_is_the_difference_of_logprobs():
    added = implicit_reward(PairLogprobs((-0.1,), (-0.9,)), PairLogprobs((-0.3,), (-0.4,)))
    assert added.chosen == pytest.approx((0.2,))
    assert added.rejected == pytest.approx((-0.5,))


@pytest.mark.parametrize(
    ("number", "taken"), [(2, [0, 5]), (3, [0, 3, 6]), (10, list(range(10))), (99, list(range(10)))]
)
def test_items_are_spread_evenly(number, taken):
    assert evenly_spaced(range(10), number) == taken


def new_run(root: Any) -> Run:
    run = Run.create(root, resolve(REQUIRED | {"iterations": 1}))
    for number, values in ((0, [10.0, 20.0, 30.0, None]), (1, [30.0, 40.0, 50.0, 40.0])):
        scenes = [row(at) | {"relevance": value} for at, value in enumerate(values)]
        files.write_json(run.evaluation_path(number, "world"), {"metrics": {}, "protocol": {}, "rows": scenes})
    run.mark_done(1, "train")
    return run


def test_relevance_histograms_share_their_bins(tmp_path):
    found = relevance(new_run(tmp_path))
    assert found is not None
    assert (found["edges"][0], found["edges"][-1]) == (10.0, 50.0)
    assert sum(found["before"]) == pytest.approx(1.0)
    assert found["after"][-1] == pytest.approx(1 / 4)
    assert len(found["edges"]) == len(found["after"]) + 1


def test_an_untrained_run_is_refused(tmp_path):
    with pytest.raises(CsrError, match="no finished iteration to analyze"):
        analyze(Run.create(tmp_path, resolve(REQUIRED)), Silent())


def analysis(iteration: int, change: float) -> dict[str, Any]:
    view = {"before": 0.9, "after": 0.9 + change, "value": change, "low": change - 0.01, "high": change + 0.01}
    metric = {"value": 0.75, "low": 0.7, "high": 0.8, "n": 9}
    metrics = {"margin": metric, "preferred": metric, "auc": metric}
    separability_row = {
        "pairs": "iteration 1",
        "from": 0,
        "to": 1,
        "before": metrics,
        "after": metrics,
        "implicit_reward": metrics,
    }
    easier = {**metrics, "auc": metric | {"value": 0.95}}
    return {
        "iteration": iteration,
        "attention": {"layers": [{"mass": view, "relative": view, "beyond_sinks": view}], "protocol": {"pass": "one"}},
        "separability": [separability_row, separability_row | {"pairs": "external", "before": easier}],
        "relevance": None,
        "rewards": {},
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (0.01, "Attention to the image is unchanged"),
        (0.2, "1 attend significantly more to the image than before and 0 less"),
    ],
)
def test_the_report_describes_the_change_in_attention(tmp_path, change, words):
    run = new_run(tmp_path)
    files.write_json(tmp_path / "analysis.json", analysis(1, change))
    text = Page(render(run)).text
    assert HEADING in text
    assert words in text
    assert "External pairs are easier for it to separate" in text


def test_an_analysis_of_another_iteration_is_not_shown(tmp_path):
    run = new_run(tmp_path)
    assert HEADING not in render(run)
    files.write_json(tmp_path / "analysis.json", analysis(2, 0.1))
    assert HEADING not in render(run)
