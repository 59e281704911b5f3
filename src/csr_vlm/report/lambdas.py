"""How the pairs would change with lambda (eq. 4), computed from the ledger without generating again.

What a lambda is worth shows only after training: ``csr sweep`` trains for every value, and
what it measured stands here beside the pairs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from csr_vlm.config.schema import MethodConfig
from csr_vlm.core.batching import evenly_spaced
from csr_vlm.core.errors import CsrError
from csr_vlm.core.formatting import fixed
from csr_vlm.core.records import Node, Pair, Prompt
from csr_vlm.evaluation.known_pictures import TruthOf, no_truth
from csr_vlm.method.audit import pair_metrics, tree_metrics
from csr_vlm.method.pairs import make_pairs
from csr_vlm.report.charts import Axes, Point, Series, chart
from csr_vlm.report.measures import MEASURES, Measure
from csr_vlm.report.panels import Figure
from csr_vlm.store import files, tables
from csr_vlm.store.run import Run

_WEIGHTS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
_MOST_PROMPTS = 48
_WINS = ("relevance_win", "Chosen suits the image better", "share of pairs; 0.5 is chance", True)
_OMITS = ("omission_gap", "Left out of what was seen", "sentences a pair, chosen less rejected", False)
_SWEPT = ("chair_s", "recall", "relevance")


@dataclass(frozen=True)
class Lambdas:
    """The curves over lambda."""

    iteration: int
    own: float
    num_prompts: int
    figures: Sequence[Figure]
    trained: Sequence[Figure]
    """What was measured after training with other values; empty before ``csr sweep``."""


@dataclass(frozen=True)
class _At:
    """What one lambda makes of the sampled prompts."""

    pairs: Sequence[Pair]
    signs: Mapping[str, float]

    @property
    def sides(self) -> set[tuple[str, str, str]]:
        return {(pair.prompt.prompt_id, pair.chosen.node_id, pair.rejected.node_id) for pair in self.pairs}


def lambda_panel(run: Run, truth_of: TruthOf = no_truth) -> Lambdas | None:
    """Derive the pairs of the first ledger under several lambdas.

    None without a ledger, and where pairs are drawn at random, so that lambda decides nothing.
    """
    done = [number for number in run.iterations_done("generate") if number]
    if not done or not run.prompts_path.is_file() or run.config.method.pairs.selection == "random":
        return None
    own, trees = run.config.method.lambda_, _trees(run, done[0])
    try:
        found = {weight: _at(run, trees, weight) for weight in sorted({*_WEIGHTS, own})}
    except CsrError:  # the ledger lacks a score that the reward needs; csr pairs says which
        return None
    figures = [_same(found, own), _sign(found, own, *_WINS), _truth(found, own, truth_of) or _sign(found, own, *_OMITS)]
    return Lambdas(done[0], own, len(trees), [f for f in figures if f.svg], _trained(run, done[0]))


def _trees(run: Run, iteration: int) -> list[tuple[Prompt, list[Node]]]:
    """Read some prompts' trees."""
    prompts = evenly_spaced(list(run.prompts()), _MOST_PROMPTS)
    nodes: dict[str, list[Node]] = defaultdict(list)
    for part in run.ledger_parts(iteration):
        for node in tables.read_nodes_of(part, [prompt.prompt_id for prompt in prompts]):
            nodes[node.prompt_id].append(node)
    return [(prompt, nodes[prompt.prompt_id]) for prompt in prompts if nodes[prompt.prompt_id]]


def _at(run: Run, trees: Sequence[tuple[Prompt, list[Node]]], weight: float) -> _At:
    method: MethodConfig = run.config.method.model_copy(update={"lambda_": weight})
    scorer, seed = run.config.scorer.used, run.config.seed
    pairs: list[Pair] = []
    signs = []
    for prompt, nodes in trees:
        made = make_pairs(prompt, nodes, method, scorer, seed)
        mine = [] if isinstance(made, str) else made
        pairs += mine
        signs.append(tree_metrics(nodes, mine, method, scorer))
    return _At(pairs, pair_metrics(signs))


def _figure(label: str, meaning: str, series: Sequence[Series], own: float, hint: str = "", **axes: Any) -> Figure:
    hint = hint or f"over λ; the dotted line is this run’s {own:g}"
    text = "; ".join(point.title for line in series for point in line.points)
    frame = Axes(digits=2, x_ticks=(0.0, 0.25, 0.5, 0.75, 1.0), x_marker=own, label_points=False, **axes)
    legend = [(line.style, line.name) for line in series] if len(series) > 1 else []
    return Figure(label, meaning, hint, chart(f"{label}: {text}", series, frame), legend)


def _same(found: Mapping[float, _At], own: float) -> Figure:
    """How many of the run's pairs another lambda would make too."""
    mine = found[own].sides
    shares = {weight: len(at.sides & mine) / len(mine) for weight, at in found.items()} if mine else {}
    points = [Point(weight, share, title=f"λ = {weight:g}: {fixed(share, 2)}") for weight, share in shares.items()]
    return _figure(
        "Pairs that stay", "share of this run’s pairs", [Series("pairs", points)], own, from_zero=True, at_most=1.0
    )


def _sign(found: Mapping[float, _At], own: float, name: str, label: str, meaning: str, zero: bool) -> Figure:
    points = [
        Point(weight, at.signs[name], title=f"λ = {weight:g}: {fixed(at.signs[name], 2)}")
        for weight, at in found.items()
        if name in at.signs
    ]
    return _figure(label, meaning, [Series(label, points)], own, from_zero=zero, at_most=1.0 if zero else None)


def _truth(found: Mapping[float, _At], own: float, truth_of: TruthOf) -> Figure | None:
    """How often either side names something absent, where the truth is known."""
    known = {pair.prompt.prompt_id: truth_of(pair.prompt.prompt_id) for at in found.values() for pair in at.pairs}
    if not any(known.values()):
        return None
    series = []
    for style, side in enumerate(("chosen", "rejected")):
        points = []
        for weight, at in found.items():
            hallucinates = [
                bool(picture.hallucinated(getattr(pair, side).text))
                for pair in at.pairs
                if (picture := known[pair.prompt.prompt_id]) is not None
            ]
            if hallucinates:
                share = sum(hallucinates) / len(hallucinates)
                points.append(Point(weight, share, title=f"λ = {weight:g}, {side}: {fixed(share, 2)}"))
        series.append(Series(side, points, style))
    return _figure("Names something absent", "share of pairs, by the truth", series, own, from_zero=True, at_most=1.0)


def _trained(run: Run, iteration: int) -> list[Figure]:
    """Read the sweeps over lambda alone, kept where ``csr sweep`` keeps them by default."""
    measured: dict[float, Mapping[str, Any]] = {}
    for path in sorted((run.root / "sweeps").glob("*/result.json")):
        found = files.read_json(path)
        key, _, value = found["overrides"][0].partition("=") if len(found["overrides"]) == 1 else ("", "", "")
        if key == "method.lambda" and found["metrics"] and found.get("iteration", iteration) == iteration:
            measured[float(value)] = found["metrics"].get("world") or next(iter(found["metrics"].values()))
    if len(measured) < 2:
        return []
    figures = [_swept(measure, measured, run.config.method.lambda_) for measure in MEASURES if measure.key in _SWEPT]
    return [figure for figure in figures if figure.svg]


def _swept(measure: Measure, measured: Mapping[float, Mapping[str, Any]], own: float) -> Figure:
    points = [
        Point(weight, m["value"], m["low"], m["high"], f"λ = {weight:g}: {fixed(m['value'], measure.digits)}")
        for weight, metrics in sorted(measured.items())
        if (m := metrics.get(measure.key)) is not None and m["value"] is not None
    ]
    series = [Series(measure.label, points)]
    return _figure(
        measure.label, measure.meaning, series, own, measure.hint, from_zero=measure.from_zero, at_most=measure.at_most
    )
