"""Check the arithmetic of training costs against numbers worked out by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from benchmarks import training_cost

from csr_vlm.pipeline.training_cost import TrainedModel, TreeShape


def test_a_tree_has_every_token_once() -> None:
    tree = TreeShape(prompt=600, path=40, pairs=3, sentence=10, questions=2, question=20)
    assert tree.tokens == 600 + 40 + 60 + 40
    assert tree.targets == 40 + 60 + 8
    # Six rows of prompt, half of the path and a sentence; four of prompt and question.
    assert tree.separate_tokens == 6 * 630 + 4 * 620


def test_operations_of_a_small_model() -> None:
    model = TrainedModel(1000, 1200, layers=2, width=8, vocabulary=16, vision_parameters=50, vision_tokens=4)
    linear, attention, output, image = 6 * 1000 * 10 + 8 * 30 * 10, 16 * 2 * 8 * 100, 6 * 8 * 16 * 3, 2 * 50 * 4
    assert model.tree_operations(10, 3, 30) == linear + attention + output + image


def test_memory_of_a_small_model() -> None:
    model = TrainedModel(1000, 1200, layers=2, width=8, vocabulary=16)
    assert model.memory_bytes(100, 30, 2.0) == pytest.approx(2400 + 480 + 100 * 8 * 36 * 2)


@pytest.mark.parametrize("arguments", [[], ["--pairs", "12"]], ids=["4 pairs", "12 pairs"])
def test_the_page_on_scaling_has_every_printed_figure(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["training_cost.py", *arguments])
    training_cost.main()
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    section = page.split("### What training 13,000 prompts costs")[1].split("\n## ")[0]
    assert figures(capsys.readouterr().out) <= figures(section)


def figures(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:\.\d+)?(?:e\d+)?", text.replace("e+", "e").replace(",", "")))
