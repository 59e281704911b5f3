"""State what an estimate assumes: each quantity with a cheap, a likely and a costly value, and its source.

Nothing has been timed on a GPU yet. Times on the host are from a core of an AMD EPYC (docs/log.md); the rest are
usual figures. A measured run replaces them (:mod:`csr_vlm.pipeline.measured`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

CASES = ("low", "likely", "high")


@dataclass(frozen=True)
class Assumption:
    """Hold one assumed quantity in the cheap, the likely and the costly case."""

    name: str
    low: float
    likely: float
    high: float
    unit: str
    source: str


@dataclass(frozen=True)
class Case:
    """Hold the values of all assumptions in one case; :data:`ASSUMPTIONS` says what they are."""

    min_sentences: float
    max_sentences: float
    min_tokens: float
    max_tokens: float
    step_launches: float
    adapter_launches: float
    launch_microseconds: float
    row_microseconds: float
    vllm_step: float
    vllm_row_microseconds: float
    bandwidth_share: float
    prefill_share: float
    training_share: float
    nf4_share: float
    scorer_share: float
    picture_milliseconds: float
    check_milliseconds: float
    check_threads: float
    pairs_milliseconds: float
    with_pairs: float
    reference_passes: float
    gpus_in_training: float
    start_seconds: float
    disk_rate: float
    overhead: float


ASSUMPTIONS: Sequence[Assumption] = (
    Assumption("min_sentences", 4, 4, 6, "sentences of the shortest response", "LLaVA-like descriptions"),
    Assumption("max_sentences", 6, 8, 8, "sentences of the longest response", "LLaVA-like descriptions"),
    Assumption("min_tokens", 8, 8, 8, "tokens of the shortest sentence", "LLaVA-like descriptions"),
    Assumption("max_tokens", 35, 35, 35, "tokens of the longest sentence", "LLaVA-like descriptions"),
    Assumption("step_launches", 66, 66, 66, "operations and views a layer and decoding step", "counted"),
    Assumption(
        "adapter_launches", 72, 72, 72, "the same with a LoRA beside the weights",
        "163 of version 0.1, divided by the measured ratio of host times",
    ),
    Assumption(
        "launch_microseconds", 6, 9, 18, "host time of one of them, in microseconds",
        "high: measured on a core of an AMD EPYC (12.7; 18.2 with the adapter); low and likely: faster cores, assumed",
    ),
    Assumption("row_microseconds", 10, 20, 40, "host time of a row and step, in microseconds", "assumed"),
    Assumption("vllm_step", 4, 6, 12, "host time of a step of vLLM, in milliseconds", "assumed (CUDA graphs)"),
    Assumption("vllm_row_microseconds", 10, 20, 50, "host time of a row and step of vLLM, in microseconds", "assumed"),
    Assumption("bandwidth_share", 0.8, 0.65, 0.5, "share of the memory bandwidth reached in decoding", "assumed"),
    Assumption("prefill_share", 0.55, 0.4, 0.25, "share of the peak reached in vision and prefill", "assumed"),
    Assumption("training_share", 0.45, 0.35, 0.25, "share of the peak reached in training", "assumed"),
    Assumption("nf4_share", 0.8, 0.7, 0.5, "further share reached with 4-bit weights", "assumed"),
    Assumption("scorer_share", 0.5, 0.35, 0.2, "share of the float32 peak reached by the scorer", "assumed"),
    Assumption(
        "picture_milliseconds", 10, 15, 20, "host time to decode and process a picture, in milliseconds",
        "high: measured at 640 x 480 on a core of an AMD EPYC",
    ),
    Assumption(
        "check_milliseconds", 2.5, 3.5, 4.3, "host time to check a picture before the run, in milliseconds",
        "high: measured (benchmarks/scale.py serial)",
    ),
    Assumption(
        "check_threads", 8, 4, 2, "threads' worth of speed of that check, with the model's processor on every picture",
        "assumed",
    ),
    Assumption(
        "pairs_milliseconds", 1.5, 2, 2.7, "host time to derive a prompt's pairs, in milliseconds",
        "high: measured (benchmarks/scale.py serial)",
    ),
    Assumption("with_pairs", 0.6, 0.8, 1, "share of the prompts with pairs or questions", "0.87 in the demo"),
    Assumption(
        "reference_passes", 0, 1, 1, "forward passes for reference log-probabilities",
        "0 if the ledger's hold, which has not been tried in bfloat16 at this size",
    ),
    Assumption("gpus_in_training", 0.9, 0.8, 0.6, "share of the ideal speed-up of training on several GPUs", "assumed"),
    Assumption("start_seconds", 15, 30, 60, "seconds to start a stage, besides reading the weights", "assumed"),
    Assumption("disk_rate", 3e9, 1.5e9, 0.6e9, "bytes of weights read per second", "22 s for 13.8 GB measured"),
    Assumption("overhead", 1.05, 1.15, 1.3, "factor of memory for fragments and the CUDA context", "assumed"),
)  # fmt: skip
"""Every assumption, in the order of :class:`Case`."""


def cases() -> Iterator[Case]:
    """Yield the cheap, the likely and the costly case."""
    assert [field.name for field in fields(Case)] == [assumption.name for assumption in ASSUMPTIONS]
    for case in CASES:
        yield Case(*(float(getattr(assumption, case)) for assumption in ASSUMPTIONS))


def dump() -> list[dict[str, Any]]:
    """Return all assumptions as JSON data."""
    return [vars(assumption) for assumption in ASSUMPTIONS]
