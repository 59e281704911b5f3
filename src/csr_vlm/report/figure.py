"""Draw a run as one self-contained SVG for a README or a paper: ``csr report RUN --figure FILE``."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from csr_vlm.core.errors import CsrError
from csr_vlm.core.formatting import plural
from csr_vlm.evaluation.compare import policy_name
from csr_vlm.evaluation.known_pictures import TruthOf, no_truth
from csr_vlm.evaluation.metrics import MetricSpec
from csr_vlm.report import charts
from csr_vlm.report.annotate import absent_spans
from csr_vlm.report.before_after import absent_words, heldout_prompts
from csr_vlm.report.charts import indexed_tspans
from csr_vlm.report.conclusion import conclude
from csr_vlm.report.evaluations import Evaluation, paired_rows, read_evaluation
from csr_vlm.report.limits import shorten
from csr_vlm.report.panels import metric_chart
from csr_vlm.report.pictures import Picture, embed_picture
from csr_vlm.store import files
from csr_vlm.store.run import Run

WIDTH, _MARGIN, _GAP = 800, 20, 16
_PICTURE_WIDTH, _PICTURE_HEIGHT = 120, 96
_FONT_SIZE, _LINE_HEIGHT = 12.5, 17
_HEADING_SIZE, _HEADING_LINE_HEIGHT = 16.0, 22
_NUM_EXAMPLES, _MAX_LINES = 3, 10
_COLUMNS = (_MARGIN + _PICTURE_WIDTH + _GAP, (WIDTH + _PICTURE_WIDTH + 2 * _GAP) // 2)
"""Left edges of the two columns of responses."""
COLUMN_WIDTH = WIDTH - _MARGIN - _COLUMNS[1]
_STYLE = """\
text { fill: #1a1c20;
  font-family: -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
.page { fill: #ffffff; } .frame { fill: none; stroke: #d8d5cf; }
.conclusion { font-size: 16px; font-weight: 600; } .label { font-size: 13px; font-weight: 600; }
.hint { font-size: 11.5px; fill: #5c616b; } .response { font-size: 12.5px; } .sub { font-size: 75%; }
.absent { fill: #a33405; font-weight: 700; text-decoration: underline; }
.chart text { font-size: 14px; } .chart .tick { fill: #5c616b; } .chart .tick.y { text-anchor: end; }
.chart .tick.x, .chart .value { text-anchor: middle; } .chart .value { font-weight: 600; }
.chart .beside { text-anchor: start; }
.chart .grid { stroke: #e4e1db; } .chart .axis { stroke: #8d9199; } .chart .target { fill: none; }
.chart .line { fill: none; stroke: #0b6bb5; stroke-width: 2.4; } .chart .whisker { stroke: #0b6bb5; stroke-width: 1.6; }
.chart .dot { fill: #0b6bb5; }
"""
_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_CHAR_WIDTHS = {"iljt.,;:'|!fr()[]/\\ ": 0.42, "mwMWQO@%&—…": 1.0}
"""Characters to an upper bound of their width in em, in the widest common sans-serif font (DejaVu Sans)."""
_BOLD_WIDTH = 1.13


@dataclass(frozen=True)
class _Example:
    """Represent a prompt with the stored rows of the first and the last policy."""

    picture: Picture
    before: Mapping[str, Any]
    after: Mapping[str, Any]


@dataclass(frozen=True)
class _Block:
    """Represent a part of the figure and its height."""

    markup: Markup
    height: float


def write_figure(run: Run, path: Path, truth_of: TruthOf = no_truth) -> Path:
    """Write the figure of a run and return its path.

    Raises:
        CsrError: Fewer than two policies of the run have been evaluated.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, render_figure(run, truth_of))
    return path


def render_figure(run: Run, truth_of: TruthOf = no_truth) -> str:
    """Return the figure as SVG: the conclusion, the headline metrics over the iterations, and examples.

    Raises:
        CsrError: Fewer than two policies of the run have been evaluated.
    """
    evaluation = read_evaluation(run)
    if evaluation is None or evaluation.first == evaluation.last:
        raise CsrError(
            f"{run.root} has no evaluation of both the base model and a trained policy",
            "set evaluation.world or evaluation.heldout, then run csr eval RUN",
        )
    conclusion = conclude(run, evaluation).sentence
    examples = list(islice(_examples(run, evaluation, truth_of), _NUM_EXAMPLES))
    blocks = [_heading(conclusion), _charts(evaluation), *_example_blocks(evaluation, examples)]
    parts, y = [], float(_MARGIN)
    for block in blocks:
        parts.append(Markup('<g transform="translate(0 {:.0f})">{}</g>').format(y, block.markup))
        y += block.height + _GAP
    svg = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1:.0f}" width="{0}" height="{1:.0f}" role="img">'
        '<title>{2}</title><style>{3}</style><rect class="page" width="{0}" height="{1:.0f}"/>{4}</svg>\n'
    ).format(WIDTH, y, conclusion, Markup(_STYLE), Markup("").join(parts))  # noqa: S704 - a constant
    # A model can generate control characters, which XML does not allow even when escaped.
    return _NOT_XML.sub("\ufffd", svg)


def _heading(conclusion: str) -> _Block:
    lines = wrap(conclusion, WIDTH - 2 * _MARGIN, _HEADING_SIZE, [(0, len(conclusion))])
    parts = [
        _text(_MARGIN, _HEADING_LINE_HEIGHT * (index + 0.75), indexed_tspans(conclusion[start:end]), "conclusion")
        for index, (start, end) in enumerate(lines)
    ]
    return _Block(Markup("").join(parts), _HEADING_LINE_HEIGHT * len(lines))


def _charts(evaluation: Evaluation) -> _Block:
    """Draw the report's charts of the headline metrics side by side."""
    specs = evaluation.headline
    width = (WIDTH - 2 * _MARGIN - _GAP * (len(specs) - 1)) / len(specs)
    scale = width / charts.WIDTH
    parts = [_chart(spec, evaluation, _MARGIN + index * (width + _GAP), scale) for index, spec in enumerate(specs)]
    num_prompts = plural(evaluation.metric(evaluation.last, specs[0].key).n, "prompt")
    height = 38 + scale * charts.HEIGHT
    note = escape(f"By iteration, on {num_prompts}. Bars: 95 % intervals.")
    parts.append(_text(_MARGIN, height + 14, note, "hint"))
    return _Block(Markup("").join(parts), height + 18)


def _chart(spec: MetricSpec, evaluation: Evaluation, x: float, scale: float) -> Markup:
    _, series, axes = metric_chart(spec, evaluation)
    hint = spec.hint if spec.axis_from_zero or not spec.hint else f"{spec.hint}; axis does not start at 0"
    return Markup('{}{}<g class="chart" transform="translate({:.1f} 36) scale({:.4f})">{}</g>').format(
        _text(x, 13, indexed_tspans(spec.label), "label"),
        _text(x, 29, escape(hint), "hint"),
        x,
        scale,
        charts.chart_body([series], axes),
    )


def _examples(run: Run, evaluation: Evaluation, truth_of: TruthOf) -> Iterator[_Example]:
    """Yield prompts with a picture in the order of the evaluation.

    If hallucinations are counted, only prompts are yielded whose first response hallucinates and whose last
    does not. They are not hand-picked.
    """
    prompts = heldout_prompts(run)
    for before, after in paired_rows(evaluation):
        if evaluation.truth_known and not (before["hallucinated"] and not after["hallucinated"]):
            continue
        prompt_id = str(before["id"])
        picture = embed_picture(prompt_id, prompts.get(prompt_id), run.config.data.max_image_pixels, truth_of)
        if picture.uri is not None:
            yield _Example(picture, before, after)


def _example_blocks(evaluation: Evaluation, examples: Sequence[_Example]) -> list[_Block]:
    if not examples:
        return []
    names = [policy_name(number).capitalize() for number in (evaluation.first, evaluation.last)]
    headings = [_text(x, 12, escape(name), "label") for x, name in zip(_COLUMNS, names, strict=True)]
    blocks = [_Block(Markup("").join(headings), 4), *(_example(example) for example in examples)]
    if evaluation.truth_known:
        text = (
            "The first test images on which only the base model hallucinates; "
            "underlined: objects that are not in the image."
        )
        blocks.append(_Block(_text(_MARGIN, 10, escape(text), "hint"), 8))
    return blocks


def _example(example: _Example) -> _Block:
    picture = example.picture
    scale = min(_PICTURE_WIDTH / picture.width, _PICTURE_HEIGHT / picture.height)
    width, height = picture.width * scale, picture.height * scale
    parts = [
        Markup('<image x="{0}" y="4" width="{1:.1f}" height="{2:.1f}" href="{3}"><title>{4}</title></image>').format(
            _MARGIN, width, height, picture.uri, picture.alt
        ),
        Markup('<rect class="frame" x="{}" y="4" width="{:.1f}" height="{:.1f}"/>').format(_MARGIN, width, height),
    ]
    num_lines = 0
    for x, row in zip(_COLUMNS, (example.before, example.after), strict=True):
        lines = response_lines(row)
        num_lines = max(num_lines, len(lines))
        parts += [_text(x, _LINE_HEIGHT * (i + 0.85), line, "response") for i, line in enumerate(lines)]
    return _Block(Markup("").join(parts), max(height + 4, _LINE_HEIGHT * num_lines))


def response_lines(row: Mapping[str, Any]) -> list[Markup]:
    """Wrap a response to the width of its column, one sentence after another, and mark hallucinated words."""
    absent = absent_words(row)
    lines: list[Markup] = []
    for sentence, _ in row.get("sentences") or [(row["text"], None)]:
        text = " ".join(shorten(str(sentence)).split())
        spans = absent_spans(text, absent)
        lines += [_marked(text, start, end, spans) for start, end in wrap(text, COLUMN_WIDTH, _FONT_SIZE, spans)]
    return lines if len(lines) <= _MAX_LINES else [*lines[: _MAX_LINES - 1], Markup("…")]


def wrap(text: str, width: float, size: float, bold: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Break a text into lines, at spaces if possible.

    Args:
        text: One paragraph.
        width: Width of a line in pixels.
        size: Font size in pixels.
        bold: (start, end) offsets of bold parts.

    Returns:
        (start, end) offsets of each line.
    """
    lines: list[tuple[int, int]] = []
    start, space, used = 0, -1, 0.0
    for index, char in enumerate(text):
        is_bold = any(first <= index < last for first, last in bold)
        if char == " ":
            space = index
        char_width = size * _char_width(char) * (_BOLD_WIDTH if is_bold else 1.0)
        if used + char_width > width and index > start:
            end = space if space > start else index
            lines.append((start, end))
            start = end + 1 if end == space else end
            used = text_width(text[start:index], size, bold=True)
        used += char_width
    if start < len(text):
        lines.append((start, len(text)))
    return lines


def text_width(text: str, size: float, bold: bool = False) -> float:
    """Return an upper bound of the width of a text in pixels."""
    return size * (_BOLD_WIDTH if bold else 1.0) * sum(map(_char_width, text))


def _char_width(char: str) -> float:
    for chars, width in _CHAR_WIDTHS.items():
        if char in chars:
            return width
    if unicodedata.east_asian_width(char) in "WF":
        return 1.05
    return 0.66 if char.islower() or char.isdigit() else 0.8


def _marked(text: str, start: int, end: int, spans: Sequence[tuple[int, int]]) -> Markup:
    """Escape one line of a text and mark the parts in ``spans``."""
    parts: list[Markup] = []
    position = start
    for span_start, span_end in spans:
        first, last = max(span_start, position), min(span_end, end)
        if first < last:
            marked = Markup('<tspan class="absent">{}</tspan>').format(text[first:last])
            parts += [escape(text[position:first]), marked]
            position = last
    return Markup("").join([*parts, escape(text[position:end])])


def _text(x: float, y: float, content: Markup, css: str) -> Markup:
    return Markup('<text class="{}" x="{:.0f}" y="{:.1f}">{}</text>').format(css, x, y, content)
