"""One picture of a run, for a README or a paper: ``csr report RUN --figure FILE``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.known_pictures import TruthOf
from csr_vlm.store.files import read_json
from csr_vlm.store.run import Run

_LINES = (("chair_s", "CHAIR_S", "#c0392b"), ("chair_i", "CHAIR_I", "#e08e0b"), ("recall", "recall", "#1f77b4"))
_EXAMPLES = 3


def write_figure(run: Run, path: Path, truth_of: TruthOf) -> Path:
    """Draw the metrics over iterations and some pictures described before and after.

    Raises:
        CsrError: The run was not evaluated on the world.
    """
    numbers = run.iterations_done("evaluate")
    if len(numbers) < 2:
        raise CsrError(f"{run.root} has no evaluations to draw", "set evaluation.world and run it")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.6), squeeze=False)[0]
    _draw_metrics(left, {n: run.metrics(n) for n in numbers})
    before, after = (read_json(run.evaluation_path(n, "world"))["rows"] for n in (numbers[0], numbers[-1]))
    _draw_examples(right, before, after, truth_of)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _draw_metrics(figure: Any, metrics: dict[int, dict[str, Any]]) -> None:
    axes = figure.subplots()
    for name, label, color in _LINES:
        found = [m[name] for m in metrics.values()]
        values = [m["value"] for m in found]
        errors = [[m["value"] - m["low"] for m in found], [m["high"] - m["value"] for m in found]]
        legend = f"{label}  {values[0]:.3f} → {values[-1]:.3f}"
        axes.errorbar(list(metrics), values, yerr=errors, color=color, marker="o", capsize=3, label=legend)
    axes.set_xticks(list(metrics), ["base", *map(str, list(metrics)[1:])])
    axes.set_xlabel("iteration")
    axes.set_ylim(0, 1.08)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center right")
    axes.set_title(f"{found[0]['n']} test scenes, 95 % intervals", fontsize=10, loc="left")


def _draw_examples(figure: Any, before: list[dict[str, Any]], after: list[dict[str, Any]], truth_of: TruthOf) -> None:
    mended = [
        (old, new)
        for old, new in zip(before, after, strict=True)
        if old["hallucinated"] and not new["hallucinated"] and truth_of(old["id"]) is not None
    ]
    # The first mended scenes in test order, not the prettiest.
    all_axes = figure.subplots(_EXAMPLES, 3, width_ratios=(1, 1.7, 1.7), squeeze=False)
    for row, (old, new) in zip(all_axes, mended, strict=False):
        found = truth_of(old["id"])
        assert found is not None
        row[0].imshow(found.draw(4))
        _write(row[1], old)
        _write(row[2], new)
    for axes, title in zip(all_axes[0], ("", "base model", "after CSR"), strict=True):
        axes.set_title(title, fontsize=10, loc="left")
    for axes in all_axes.flat:
        axes.axis("off")


def _write(axes: Any, row: dict[str, Any]) -> None:
    """Write a response line by line, what is not in the picture in red."""
    for number, sentence in enumerate(part for part in row["text"].split(". ") if part):
        false = any(kind in sentence for kind in row["hallucinated"])
        axes.text(
            0,
            0.9 - 0.17 * number,
            sentence.rstrip(".") + ".",
            color="#c0392b" if false else "#222222",
            fontweight="bold" if false else "normal",
            fontsize=8.5,
            va="center",
            transform=axes.transAxes,
        )
