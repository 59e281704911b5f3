"""Test the SVG figure of a run on synthetic runs; no model is loaded."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from csr_vlm.cli.app import app
from csr_vlm.core.errors import CsrError
from csr_vlm.report.figure import COLUMN_WIDTH, render_figure, response_lines, text_width, wrap, write_figure
from csr_vlm.store import files
from csr_vlm.store.run import Run
from csr_vlm.world.truth import known_scene
from tests.unit.test_report import HANDLER, SCRIPT, add_evaluation, metrics, new_run, row
from tests.unit.test_report_parts import heldout_run

SVG = "{http://www.w3.org/2000/svg}"


def evaluated_run(root: Path, text: str = "There is a fish.", **settings: Any) -> Run:
    """Create a run in which four of five scenes improve."""
    run = new_run(root, **settings)
    before = [row(n, "fish", text=text) for n in range(4)] + [row(4)]
    add_evaluation(run, 0, metrics(0.48), before)
    add_evaluation(run, 2, metrics(0.16), [row(n, text="There is a red boat.") for n in range(5)])
    return run


def elements(svg: str, tag: str) -> list[ET.Element]:
    return list(ET.fromstring(svg).iter(f"{SVG}{tag}"))


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in elements(svg, "text")]


def test_the_figure_shows_conclusion_metrics_and_examples(tmp_path: Path) -> None:
    svg = render_figure(evaluated_run(tmp_path / "run"), known_scene)
    shown = texts(svg)
    assert "After 2 iterations, CHAIRS fell from 0.480 to 0.160 (−67 %)" in " ".join(shown).replace("_", "")
    assert {"CHAIRS", "CHAIRI", "Recall", "Base model", "Iteration 2", "0.480", "0.160"} <= set(shown)
    assert len(elements(svg, "image")) == 3
    marked = [element.text for element in elements(svg, "tspan") if element.get("class") == "absent"]
    assert marked == ["fish"] * 3


def test_the_figure_is_self_contained(tmp_path: Path) -> None:
    svg = render_figure(evaluated_run(tmp_path / "run"), known_scene)
    assert all(image.get("href", "").startswith("data:image/png;base64,") for image in elements(svg, "image"))
    assert not elements(svg, "script")
    assert len(elements(svg, "style")) == 1
    assert "url(" not in svg
    assert "@import" not in svg


def test_untrusted_text_is_escaped_and_valid_xml(tmp_path: Path) -> None:
    evil = f"{SCRIPT} {HANDLER} \x00\x08 fish ]]> &amp;"
    svg = render_figure(evaluated_run(tmp_path / "run", evil), known_scene)
    assert not elements(svg, "script")
    assert "alert(1)" in " ".join(texts(svg))
    assert all(not name.startswith("on") for element in ET.fromstring(svg).iter() for name in element.attrib)


def test_runs_without_annotations_show_relevance(tmp_path: Path) -> None:
    svg = render_figure(heldout_run(tmp_path, [20.0, 22.0, 24.0, 26.0], [23.0, 25.0, 27.0, 29.0]))
    assert {"RI", "Sentences", "Repeats"} <= set(texts(svg))
    assert not elements(svg, "image"), "no example without a picture"


def test_every_line_fits_its_column() -> None:
    text = "A very long sentence about fish, " * 9 + "W" * 200 + " 漢字" * 40
    for sentences in ([[text, 1.0]], [["Short.", 1.0], [text[:200], 2.0]]):
        lines = response_lines(row(0, "fish") | {"text": text, "sentences": sentences})
        assert 2 < len(lines) <= 10
        assert all(text_width(line.striptags(), 12.5) <= COLUMN_WIDTH for line in lines)


def test_wrapping_loses_no_character_but_spaces() -> None:
    text = "The quick brown fox jumps over " + "x" * 50 + " and rests."
    lines = [text[start:end] for start, end in wrap(text, 120, 10, [(4, 9)])]
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(text_width(line, 10) <= 120 for line in lines)
    assert lines[:2] == ["The quick brown fox", "jumps over"]
    assert wrap("", 120, 10, []) == []


def test_a_marked_word_broken_between_lines_is_marked_on_both() -> None:
    for num_chars, expected in ((10, [1]), (30, [1, 1])):
        lines = response_lines({"text": "x" * num_chars + " dining table.", "hallucinated": ["dining table"]})
        assert [line.count('class="absent"') for line in lines] == expected


def test_a_run_with_one_evaluated_policy_is_refused(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    with pytest.raises(CsrError, match="no evaluation of both"):
        render_figure(run)
    add_evaluation(run, 0, metrics(0.48), [row(0, "fish")])
    with pytest.raises(CsrError, match="no evaluation of both"):
        write_figure(run, tmp_path / "result.svg")


def test_the_command_writes_svg_only(tmp_path: Path) -> None:
    run = evaluated_run(tmp_path / "run")
    path = tmp_path / "deep" / "result.svg"
    shown = CliRunner().invoke(app, ["report", str(run.root), "--figure", str(path)])
    assert shown.exit_code == 0, shown.output
    assert str(path) in shown.stdout
    assert elements(path.read_text(encoding="utf-8"), "image")
    refused = CliRunner().invoke(app, ["report", str(run.root), "--figure", str(tmp_path / "result.png")])
    assert "ends in .svg" in str(getattr(refused.exception, "hint", refused.exception))
    assert not (tmp_path / "result.png").exists()


def test_the_figure_is_deterministic(tmp_path: Path) -> None:
    run = evaluated_run(tmp_path / "run")
    first = write_figure(run, tmp_path / "a.svg", known_scene).read_bytes()
    assert write_figure(run, tmp_path / "b.svg", known_scene).read_bytes() == first
    assert files.read_json(run.evaluation_path(0, "world"))["rows"][0]["hallucinated"] == ["fish"]
