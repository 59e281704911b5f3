"""Read the paper's published tables, and collect the results of runs to compare with them.

The tables are data (``published.yaml``), marked as a transcription. A run's result for a published
benchmark is taken from the run's stored evaluations. Equal names do not make two results
comparable, so their protocols are compared field by field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml

from csr_vlm.config.load import resolve
from csr_vlm.config.schema import presets
from csr_vlm.evaluation.compare import evaluated_iterations, lookup, read_documents
from csr_vlm.evaluation.lmms import benchmark_protocol
from csr_vlm.evaluation.statistics import Metric
from csr_vlm.store.run import Run, differences

LAMBDA_OF_ABLATION = {"only R_T": 0.0, "only R_I": 1.0}
"""Row of the published ablation to its lambda (eq. 4)."""
_METHOD = ("method", "training.lora", "training.trl", "training.projector_learning_rate", "iterations")
"""Prefixes of the settings that define the method; all others define model, data and hardware."""


@dataclass(frozen=True)
class PublishedBenchmark:
    """Describe a column of the published tables."""

    key: str
    name: str
    better: Literal["higher", "lower"]
    sources: tuple[tuple[str, str, float], ...]
    """Where to find a run's result, in order of preference: (evaluation, metric, factor to the paper's unit)."""
    protocol: Mapping[str, Any]
    """Known settings of the paper's measurement; None where the paper does not state one."""
    note: str = ""
    digits: int = 1
    """Number of decimals that the paper prints."""
    apart: str = ""
    """Why a run's number stands beside no published one; empty if it does."""
    shows: tuple[str, ...] = ()
    """Benchmarks whose results stand together in this column, where the paper leaves open which it means."""
    differs: str = ""
    """What is known to differ from the paper; empty if nothing is."""


@dataclass(frozen=True)
class PublishedTable:
    """Hold a published table."""

    columns: tuple[str, ...]
    """Keys of the benchmarks."""
    rows: Mapping[Any, tuple[float, ...]]
    """Name of a row to its values, one per column."""
    model: str = ""


@dataclass(frozen=True)
class QuotedRow:
    """Hold numbers of one method from one source."""

    name: str
    source: str
    protocol: str
    status: Literal["read", "unread"]
    """Whether the source itself was read, or was seen second-hand only."""
    values: Mapping[str, float]
    """Key of a benchmark to its number."""


@dataclass(frozen=True)
class QuotedTable:
    """Hold numbers from several sources for one model."""

    model: str
    columns: tuple[str, ...]
    rows: tuple[QuotedRow, ...]


@dataclass(frozen=True)
class Published:
    """Hold the published tables and their provenance."""

    source: str
    transcription: str
    caution: str
    benchmarks: Mapping[str, PublishedBenchmark]
    """By key."""
    main: tuple[PublishedTable, ...]
    """The main table, one per model."""
    iterations: PublishedTable
    lambdas: PublishedTable
    ablation: PublishedTable
    hallucination: QuotedTable
    """Benchmarks and methods beyond the paper."""
    not_found: tuple[str, ...]
    """What was looked for and not found in a source that can be named."""

    def main_table(self, model_path: str) -> PublishedTable:
        """Return the main table for the model that a path names: VILA, a 13B, otherwise LLaVA-1.5-7B."""
        name = model_path.lower()
        model = "vila-7b" if "vila" in name else "llava-1.5-13b" if "13b" in name else "llava-1.5-7b"
        return next(table for table in self.main if table.model.lower() == model)


@dataclass(frozen=True)
class RunResult:
    """Hold a run's result for a published benchmark, in the paper's unit."""

    metric: Metric
    evaluation: str
    protocol: Mapping[str, Any]

    @property
    def same_data(self) -> bool:
        """Return whether it was measured on the paper's kind of data rather than on drawn scenes."""
        return self.evaluation != "world"


@dataclass(frozen=True)
class ProtocolField:
    """Hold one setting of a measurement, in the paper and in a run."""

    name: str
    paper: Any
    """None where the paper does not state it."""
    own: Any
    """The run's value; None where the evaluation does not record it."""


@dataclass(frozen=True)
class RunResults:
    """Hold all results of one run that can be compared with published numbers."""

    run: Run
    by_iteration: Mapping[int, Mapping[str, RunResult]]
    """Iteration (0: base model) to benchmark key to result."""
    rewards: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """Iteration to the mean reward of its chosen responses, its rejected responses, and both."""

    @property
    def result(self) -> Mapping[str, RunResult]:
        """Return the results of the run's final policy."""
        return self.by_iteration.get(self.run.final, {})


@cache
def published() -> Published:
    """Read the published tables."""
    text = resources.files("csr_vlm.evaluation").joinpath("published.yaml").read_text(encoding="utf-8")
    raw = yaml.safe_load(text)
    benchmarks = {
        item["key"]: PublishedBenchmark(
            **item
            | {"sources": tuple(tuple(source) for source in item["sources"]), "shows": tuple(item.get("shows", ()))}
        )
        for item in raw["benchmarks"]
    }
    return Published(
        raw["source"],
        raw["transcription"],
        raw["caution"].strip(),
        benchmarks,
        tuple(_table(item) for item in raw["main"]),
        _table(raw["iterations"]),
        _table(raw["lambda"]),
        _table(raw["ablation"]),
        QuotedTable(
            raw["hallucination"]["model"],
            tuple(raw["hallucination"]["columns"]),
            tuple(QuotedRow(**row) for row in raw["hallucination"]["rows"]),
        ),
        tuple(raw["not_found"]),
    )


def _table(raw: Mapping[str, Any]) -> PublishedTable:
    rows = {name: tuple(float(value) for value in values) for name, values in raw["rows"].items()}
    return PublishedTable(tuple(raw["columns"]), rows, raw.get("model", ""))


def collect_results(run: Run) -> RunResults:
    """Collect a run's results for every published benchmark that it has measured, and its mean rewards."""
    by_iteration = {}
    for number in evaluated_iterations(run):
        documents = read_documents(run, number)
        results = {key: _find_result(benchmark, documents) for key, benchmark in published().benchmarks.items()}
        by_iteration[number] = {key: result for key, result in results.items() if result is not None}
    rewards = {}
    for number in run.iterations_done("pairs"):
        pairs = run.result(number, "pairs")
        chosen, rejected = pairs["chosen_reward"], pairs["rejected_reward"]
        rewards[number] = {"chosen": chosen, "rejected": rejected, "average": (chosen + rejected) / 2}
    return RunResults(run, by_iteration, rewards)


def _find_result(benchmark: PublishedBenchmark, documents: Mapping[str, Mapping[str, Any]]) -> RunResult | None:
    """Return the result from the first of the benchmark's sources that was measured, in the paper's unit."""
    for evaluation, name, factor in benchmark.sources:
        metric = documents.get(evaluation, {}).get("metrics", {}).get(name)
        if metric is not None and metric.get("value") is not None:
            value, low, high = (
                None if metric.get(end) is None else factor * metric[end] for end in ("value", "low", "high")
            )
            scaled = Metric(value, low, high, metric.get("n") or 0)
            document = documents[evaluation]
            protocol = benchmark_protocol(document, name) if evaluation == "lmms" else document["protocol"]
            return RunResult(scaled, evaluation, protocol)
    return None


def protocol_fields(benchmark: PublishedBenchmark, result: RunResult) -> list[ProtocolField]:
    """Compare the paper's protocol with that of a run's result, field by field."""
    protocol = dict(result.protocol)
    if not result.same_data:
        protocol["data"] = f"drawn scenes of the embedded world {protocol.pop('world', '')}".strip()
    protocol.setdefault("data", result.evaluation)
    protocol.pop("interval", None)
    names = dict.fromkeys([*benchmark.protocol, *protocol])
    return [ProtocolField(name, benchmark.protocol.get(name), protocol.get(name)) for name in names]


def departures(run: Run) -> list[tuple[str, Any, Any]]:
    """List the settings of the method in which a run differs from the preset ``paper``.

    Returns:
        (dotted key, the preset's value, the run's value), sorted by key.
    """
    config = run.config.dump()
    required = {key: config[key] for key in ("model", "scorer", "data")}
    paper = resolve(required | {"preset": "paper"} | dict(presets()["paper"])).dump()
    keys = [key for key in differences(paper, config) if key.startswith(_METHOD)]
    return [(key, lookup(paper, key), lookup(config, key)) for key in sorted(keys)]


def with_lambda(runs: Sequence[RunResults], weight: float) -> list[RunResults]:
    """Select the runs with this lambda (eq. 4), except those that pair responses at random."""
    return [
        item
        for item in runs
        if abs(item.run.config.method.lambda_ - weight) < 1e-9 and item.run.config.method.pairs.selection != "random"
    ]
