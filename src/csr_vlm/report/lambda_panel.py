"""Show how the pairs depend on lambda (eq. 4), derived from the ledger without generating again.

The effect on the model is only known after training; ``csr sweep`` trains with every value, and
its results are shown beside the pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from csr_vlm.config.schema import MethodConfig
from csr_vlm.core.batching import evenly_spaced
from csr_vlm.core.errors import CsrError
from csr_vlm.core.formatting import fixed
from csr_vlm.core.records import Node, Pair, Prompt
from csr_vlm.evaluation.known_pictures import TruthOf, no_truth
from csr_vlm.evaluation.metrics import METRICS, MetricSpec
from csr_vlm.method.audit import pair_metrics, tree_metrics
from csr_vlm.method.pairs import make_pairs
from csr_vlm.report.audit_panel import LABELS
from csr_vlm.report.charts import Axes, Point, Series, chart
from csr_vlm.report.panels import Figure
from csr_vlm.store import files, ledger
from csr_vlm.store.run import Run

_LAMBDAS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
_MAX_PROMPTS = 48
_SWEPT = {"chair_s", "recall", "relevance"}
"""Metrics of a sweep that get a chart."""


@dataclass(frozen=True)
class LambdaPanel:
    """Hold the charts over lambda."""

    iteration: int
    run_lambda: float
    num_prompts: int
    figures: Sequence[Figure]
    trained_figures: Sequence[Figure]
    """Metrics after training with other values; empty before ``csr sweep``."""


@dataclass(frozen=True)
class _Outcome:
    """Hold the pairs that one lambda makes of the sampled prompts, and their audit metrics."""

    pairs: Sequence[Pair]
    metrics: Mapping[str, float]

    @property
    def keys(self) -> set[tuple[str, str, str]]:
        """Return what identifies the pairs: prompt, chosen node, rejected node."""
        return {(pair.prompt.prompt_id, pair.chosen.node_id, pair.rejected.node_id) for pair in self.pairs}


_Outcomes = Mapping[float, _Outcome]


def lambda_panel(run: Run, truth_of: TruthOf = no_truth) -> LambdaPanel | None:
    """Derive the pairs of the first ledger with several lambdas.

    Returns:
        The charts; None without a ledger, or if lambda has no effect: pairs are drawn at random, or rewards are
        the evidence for claims.
    """
    done = [number for number in run.iterations_done("generate") if number]
    method = run.config.method
    if method.pairs.selection == "random" or method.reward.unit == "claim":
        return None
    if not done or not run.prompts_path.is_file():
        return None
    run_lambda, trees = run.config.method.lambda_, _trees(run, done[0])
    try:
        outcomes = {value: _outcome(run, trees, value) for value in sorted({*_LAMBDAS, run_lambda})}
    except CsrError:  # the ledger lacks a score that the reward needs; csr pairs names it
        return None
    figures = [
        _agreement_figure(outcomes, run_lambda),
        _audit_figure(outcomes, run_lambda, "relevance_win", from_zero=True, upper_bound=1.0),
        _hallucination_figure(outcomes, run_lambda, truth_of) or _audit_figure(outcomes, run_lambda, "omission_gap"),
    ]
    shown = [figure for figure in figures if figure.svg]
    return LambdaPanel(done[0], run_lambda, len(trees), shown, _trained_figures(run, done[0]))


def _trees(run: Run, iteration: int) -> list[tuple[Prompt, list[Node]]]:
    """Read the trees of a sample of prompts."""
    prompts = evenly_spaced(list(run.prompts()), _MAX_PROMPTS)
    nodes = ledger.nodes_of(run, iteration, [prompt.prompt_id for prompt in prompts])
    return [(prompt, nodes[prompt.prompt_id]) for prompt in prompts if prompt.prompt_id in nodes]


def _outcome(run: Run, trees: Sequence[tuple[Prompt, list[Node]]], lambda_: float) -> _Outcome:
    method: MethodConfig = run.config.method.model_copy(update={"lambda_": lambda_})
    scorer, seed = run.config.scorer.used, run.config.seed
    pairs: list[Pair] = []
    metrics = []
    for prompt, nodes in trees:
        result = make_pairs(prompt, nodes, method, scorer, seed)
        prompt_pairs = [] if isinstance(result, str) else result
        pairs += prompt_pairs
        metrics.append(tree_metrics(nodes, prompt_pairs, method, scorer))
    return _Outcome(pairs, pair_metrics(metrics))


def _figure(
    label: str, meaning: str, series: Sequence[Series], run_lambda: float, hint: str = "", **axes: Any
) -> Figure:
    hint = hint or f"by λ; dotted line: this run, λ = {run_lambda:g}"
    text = "; ".join(point.title for line in series for point in line.points)
    frame = Axes(digits=2, x_ticks=_TICKS, vertical_line=run_lambda, label_points=False, **axes)
    legend = [(line.style, line.name) for line in series] if len(series) > 1 else []
    return Figure(label, meaning, hint, chart(f"{label}: {text}", series, frame), legend)


def _point(lambda_: float, value: float, name: str = "") -> Point:
    return Point(lambda_, value, title=f"λ = {lambda_:g}{name and ', '}{name}: {fixed(value, 2)}")


def _agreement_figure(outcomes: _Outcomes, run_lambda: float) -> Figure:
    """Draw the share of the run's pairs that another lambda produces too."""
    run_keys = outcomes[run_lambda].keys
    shares = {value: len(o.keys & run_keys) / len(run_keys) for value, o in outcomes.items()} if run_keys else {}
    series = [Series("pairs", [_point(value, share) for value, share in shares.items()])]
    meaning = "share of this run’s pairs"
    return _figure("Unchanged pairs", meaning, series, run_lambda, from_zero=True, upper_bound=1.0)


def _audit_figure(outcomes: _Outcomes, run_lambda: float, metric: str, **axes: Any) -> Figure:
    label, meaning = LABELS[metric]
    points = [_point(value, o.metrics[metric]) for value, o in outcomes.items() if metric in o.metrics]
    return _figure(label, meaning, [Series(label, points)], run_lambda, **axes)


def _hallucination_figure(outcomes: _Outcomes, run_lambda: float, truth_of: TruthOf) -> Figure | None:
    """Draw how often either response hallucinates; None if the objects in the images are not known."""
    prompt_ids = {pair.prompt.prompt_id for outcome in outcomes.values() for pair in outcome.pairs}
    pictures = {prompt_id: known for prompt_id in prompt_ids if (known := truth_of(prompt_id)) is not None}
    if not pictures:
        return None
    series = []
    for style, side in enumerate(("chosen", "rejected")):
        points = []
        for value, outcome in outcomes.items():
            hallucinated = [
                bool(pictures[pair.prompt.prompt_id].hallucinated(getattr(pair, side).text))
                for pair in outcome.pairs
                if pair.prompt.prompt_id in pictures
            ]
            if hallucinated:
                points.append(_point(value, sum(hallucinated) / len(hallucinated), side))
        series.append(Series(side, points, style))
    meaning = "responses that mention an absent object"
    return _figure("Hallucination", meaning, series, run_lambda, from_zero=True, upper_bound=1.0)


def _trained_figures(run: Run, iteration: int) -> list[Figure]:
    """Draw the metrics of sweeps over lambda alone, which ``csr sweep`` stores in ``RUN/sweeps`` by default."""
    measured: dict[float, Mapping[str, Any]] = {}
    for path in sorted((run.root / "sweeps").glob("*/result.json")):
        result = files.read_json(path)
        key, _, value = result["overrides"][0].partition("=") if len(result["overrides"]) == 1 else ("", "", "")
        if key == "method.lambda" and result["metrics"] and result.get("iteration", iteration) == iteration:
            measured[float(value)] = result["metrics"].get("world") or next(iter(result["metrics"].values()))
    if len(measured) < 2:
        return []
    figures = [
        _trained_figure(spec, measured, run.config.method.lambda_) for key, spec in METRICS.items() if key in _SWEPT
    ]
    return [figure for figure in figures if figure.svg]


def _trained_figure(spec: MetricSpec, measured: Mapping[float, Mapping[str, Any]], run_lambda: float) -> Figure:
    points = [
        Point(lambda_, m["value"], m["low"], m["high"], f"λ = {lambda_:g}: {spec.format(m['value'])}")
        for lambda_, metrics in sorted(measured.items())
        if (m := metrics.get(spec.key)) is not None and m["value"] is not None
    ]
    series, bounds = [Series(spec.label, points)], {"from_zero": spec.axis_from_zero, "upper_bound": spec.upper_bound}
    return _figure(spec.label, spec.meaning, series, run_lambda, spec.hint, **bounds)
