"""Test the registry of metrics against what the evaluations store."""

from __future__ import annotations

import pytest

from csr_vlm.cli.console import metric_cell
from csr_vlm.evaluation import pope
from csr_vlm.evaluation.heldout import tallies as heldout_tallies
from csr_vlm.evaluation.metrics import METRICS, POPE_METRICS, headline_metrics, metric_spec, sort_metrics


def test_every_stored_metric_has_a_label() -> None:
    stored = {*heldout_tallies(["A boat."], [30.0], complete=True), "chair_s", "chair_i", "recall", "f1"}
    stored |= {"tokens", "doubted"}
    stored |= {"companion_recall", "attributes_right", "yes_no_present", "yes_no_absent", "yes_no_companion"}
    assert stored == METRICS.keys()
    assert pope.tallies(label=True, answer=True).keys() == POPE_METRICS.keys()


@pytest.mark.parametrize(
    ("key", "label"),
    [
        ("attributes_right", "Colors right"),
        ("mean_f1", "F1, mean"),
        ("yes_ratio_popular", "Yes ratio, popular"),
        ("gqa", "gqa"),
    ],
)
def test_labels(key: str, label: str) -> None:
    assert metric_spec(key).label == label


def test_pope_defines_recall_differently() -> None:
    assert metric_spec("recall").meaning != metric_spec("recall", "pope").meaning


def test_headline_metrics_are_defined() -> None:
    assert {*headline_metrics(truth_known=True), *headline_metrics(truth_known=False)} <= METRICS.keys()


def test_metrics_are_sorted_for_display() -> None:
    keys = ["chair_s", "recall", "words", "alpha", "zeta"]
    assert sort_metrics(reversed(keys)) == keys


def test_decline_follows_the_direction() -> None:
    assert metric_spec("chair_s").decline(0.1, 0.3) == pytest.approx(0.2)
    assert metric_spec("recall").decline(0.9, 0.8) == pytest.approx(0.1)
    assert metric_spec("words").decline(10.0, 20.0) == 0.0


def test_console_cells_use_the_same_decimals() -> None:
    metric = {"value": 12.345, "low": 11.3, "high": 13.3}
    assert metric_cell("words", metric) == "12.3 ±1.0"
    assert metric_cell("unknown", {"value": 1500.04, "low": 1499, "high": 1501}) == "1500.0 ±1.0"
    assert metric_cell("recall", {"value": 0.994, "low": 0.967, "high": 0.9995}) == "0.994 +0.006 -0.027"
    assert metric_cell("chair_s", {"value": 0.0, "low": 0.0, "high": 0.06}) == "0.000 +0.060"
    assert metric_cell("chair_s", {"value": 0.48, "low": None, "high": None}) == "0.480"
    assert metric_cell("chair_s", None) == "-"
