"""The paper's published tables, and what runs measured to set beside them.

The tables are data (``published.yaml``): a transcription, marked as such. An own number is
looked for in the evaluations that a run has stored; it is a number of the same name, which
does not make it a number of the same thing, so the protocols are compared field by field.
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
from csr_vlm.evaluation.compare import evaluated, read_documents
from csr_vlm.evaluation.lmms import protocol_of
from csr_vlm.evaluation.statistics import Metric
from csr_vlm.store.run import Run, differences

LAMBDA_OF_ABLATION = {"only R_T": 0.0, "only R_I": 1.0}
_METHOD = ("method", "training.lora", "training.trl", "training.projector_learning_rate", "iterations")
"""The settings that the method consists of; the rest is where and on what."""


@dataclass(frozen=True)
class Benchmark:
    """A column of the published tables."""

    key: str
    name: str
    better: Literal["higher", "lower"]
    own: tuple[tuple[str, str, float], ...]
    """Where an own number is looked for, the first that is there: (evaluation, metric, factor)."""
    protocol: Mapping[str, Any]
    """What is known of how the paper measured it; None where it does not say."""
    note: str = ""
    digits: int = 1
    """Decimals that the paper prints."""


@dataclass(frozen=True)
class Table:
    """Published numbers: a row's name to its values, one a column."""

    columns: tuple[str, ...]
    rows: Mapping[Any, tuple[float, ...]]
    model: str = ""


@dataclass(frozen=True)
class Published:
    source: str
    transcription: str
    caution: str
    benchmarks: Mapping[str, Benchmark]
    main: tuple[Table, ...]
    iterations: Table
    lambdas: Table
    ablation: Table

    def main_table(self, model_path: str) -> Table:
        """The main table of the model that a path names: VILA, a 13B, or else the 7B."""
        name = model_path.lower()
        wanted = "vila-7b" if "vila" in name else "llava-1.5-13b" if "13b" in name else "llava-1.5-7b"
        return next(table for table in self.main if table.model.lower() == wanted)


@dataclass(frozen=True)
class Obtained:
    """An own number in the paper's units."""

    metric: Metric
    evaluation: str
    protocol: Mapping[str, Any]

    @property
    def same_data(self) -> bool:
        """Whether it was measured on the paper's kind of data; the drawn world is another."""
        return self.evaluation != "world"


@dataclass(frozen=True)
class ProtocolField:
    name: str
    paper: Any
    """None where the paper does not say."""
    own: Any
    """None where the evaluation does not say."""


@dataclass(frozen=True)
class RunNumbers:
    """Everything of one run that stands beside a published number."""

    run: Run
    by_iteration: Mapping[int, Mapping[str, Obtained]]
    """Iteration (0: base model) to benchmark key to number."""
    rewards: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """Iteration to mean reward of its chosen, its rejected, and of both."""

    @property
    def result(self) -> Mapping[str, Obtained]:
        """The numbers of the policy that the run ends with."""
        return self.by_iteration.get(self.run.final, {})


@cache
def published() -> Published:
    """Read the published tables."""
    text = resources.files("csr_vlm.evaluation").joinpath("published.yaml").read_text(encoding="utf-8")
    raw = yaml.safe_load(text)
    benchmarks = {
        item["key"]: Benchmark(**item | {"own": tuple(tuple(place) for place in item["own"])})
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
    )


def _table(raw: Mapping[str, Any]) -> Table:
    rows = {name: tuple(float(value) for value in values) for name, values in raw["rows"].items()}
    return Table(tuple(raw["columns"]), rows, raw.get("model", ""))


def numbers_of(run: Run) -> RunNumbers:
    """Gather a run's own numbers for every benchmark of the paper that it measured."""
    by_iteration = {}
    for number in evaluated(run):
        documents = read_documents(run, number)
        found = {key: _obtained(benchmark, documents) for key, benchmark in published().benchmarks.items()}
        by_iteration[number] = {key: value for key, value in found.items() if value is not None}
    rewards = {}
    for number in run.iterations_done("pairs"):
        made = run.result(number, "pairs")
        chosen, rejected = made["chosen_reward"], made["rejected_reward"]
        rewards[number] = {"chosen": chosen, "rejected": rejected, "average": (chosen + rejected) / 2}
    return RunNumbers(run, by_iteration, rewards)


def _obtained(benchmark: Benchmark, documents: Mapping[str, Mapping[str, Any]]) -> Obtained | None:
    for evaluation, name, factor in benchmark.own:
        metric = documents.get(evaluation, {}).get("metrics", {}).get(name)
        if metric is not None and metric.get("value") is not None:
            value, low, high = (
                None if metric.get(end) is None else factor * metric[end] for end in ("value", "low", "high")
            )
            scaled = Metric(value, low, high, metric.get("n") or 0)
            document = documents[evaluation]
            protocol = protocol_of(document, name) if evaluation == "lmms" else document["protocol"]
            return Obtained(scaled, evaluation, protocol)
    return None


def protocol_fields(benchmark: Benchmark, obtained: Obtained) -> list[ProtocolField]:
    """Set the paper's protocol beside that of an own number, field by field."""
    own = dict(obtained.protocol)
    if not obtained.same_data:
        own["data"] = f"drawn scenes of the embedded world {own.pop('world', '')}".strip()
    own.setdefault("data", obtained.evaluation)
    own.pop("interval", None)
    names = dict.fromkeys([*benchmark.protocol, *own])
    return [ProtocolField(name, benchmark.protocol.get(name), own.get(name)) for name in names]


def departures(run: Run) -> list[tuple[str, Any, Any]]:
    """List the settings of the method in which a run departs from the preset ``paper``.

    Returns:
        (dotted key, the paper's value, the run's value), by key.
    """
    own = run.config.dump()
    required = {key: own[key] for key in ("model", "scorer", "data")}
    paper = resolve(required | {"preset": "paper"} | dict(presets()["paper"])).dump()
    keys = [key for key in differences(paper, own) if key.startswith(_METHOD)]
    return [(key, _at(paper, key), _at(own, key)) for key in sorted(keys)]


def _at(settings: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        settings = settings.get(part) if isinstance(settings, Mapping) else None
    return settings


def with_lambda(runs: Sequence[RunNumbers], weight: float) -> list[RunNumbers]:
    """Pick the runs whose pairs were made with this lambda from a preference, not at random."""
    return [
        item
        for item in runs
        if abs(item.run.config.method.lambda_ - weight) < 1e-9 and item.run.config.method.pairs.selection != "random"
    ]
