"""Estimate what a run costs, before any weight is read.

Memory, disk and counts are upper bounds from the shapes of search and model; times are orders of
magnitude, meant to reveal a mistake of a factor of ten.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from csr_vlm.config.schema import ModelConfig, RunConfig
from csr_vlm.core.hub import require_on_disk_or_reachable
from csr_vlm.core.progress import Reporter
from csr_vlm.data.checking import ModelCheck
from csr_vlm.data.prompts import InputReport, count_rows, no_usable_prompt, read_prompts
from csr_vlm.data.sources import is_local
from csr_vlm.models.devices import resolve_device, resolve_dtype
from csr_vlm.models.load_errors import load_error, require_image_text_to_text
from csr_vlm.models.prompt_check import ProcessorCheck
from csr_vlm.pipeline.offline_pairs import check_pairs
from csr_vlm.pipeline.start import require_libraries
from csr_vlm.pipeline.training_cost import TrainedModel, TreeShape

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_NF4_BYTES = 0.6
"""Bytes of a 4-bit weight, including its share of scales and unquantized parts."""
_NODE_BYTES = 400
"""Bytes of one compressed ledger row, measured on LLaVA-like sentences of 20 tokens."""
_PROMPT_TOKENS = 700
"""Tokens of an image (576 in LLaVA-1.5) and a question."""
_SENTENCE_TOKENS = 25
"""Tokens of a typical sentence; the configured number is a limit."""
_A100_FLOPS = 1e14
"""Throughput of one A100 in large batches of half-precision decoding, in floating-point operations per second."""
_LONG_SEARCH_HOURS = 24.0
_ASSUMED_PROMPTS = 1000
"""Number of prompts to assume if they do not exist yet and data.limit is not set."""


@dataclass(frozen=True)
class Shape:
    """Hold the dimensions of a model from which costs follow."""

    parameters: int
    layers: int
    width: int
    cache_width: int
    """Numbers in the keys and values of one token in one layer."""

    @classmethod
    def of_size(cls, parameters: int) -> Shape:
        """Guess the shape of a Llama-like model: 12 * layers * width^2 parameters, width = 128 * layers."""
        layers = max(round((parameters / (12 * 128**2)) ** (1 / 3)), 1)
        return cls(parameters, layers, 128 * layers, 2 * 128 * layers)

    def lora_parameters(self, rank: int) -> int:
        """Count the parameters of a LoRA on all seven linear maps of each layer: about 19 * rank * width per layer."""
        return 19 * rank * self.width * self.layers


@dataclass(frozen=True)
class Costs:
    """Represent the cost of a run; everything is an upper bound, except ``training_memory_gb``."""

    parameters: int
    """Parameters of the base model."""
    device: str
    weights_gb: float
    search_memory_gb: float
    training_memory_gb: float
    """An approximation, not a bound."""
    sentences_per_iteration: int
    ledger_mb: float
    """Ledger of one iteration."""
    disk_gb: float
    """Everything that the run writes."""
    search_hours: float
    """Search of one iteration on this device."""
    question_hours: float
    """Claim questions of one iteration on this device."""
    training_hours: float
    """Training of one iteration on this device."""
    search_hours_a100: float
    question_hours_a100: float
    training_hours_a100: float


@dataclass(frozen=True)
class Estimate:
    """Represent the checked inputs of a run and its expected cost."""

    data: Mapping[str, Any]
    """Accepted and dropped prompts, and the same for external pairs under ``pairs``."""
    prompts: int
    """Accepted prompts."""
    iterations: int
    costs: Costs | None
    """None if the size of the model is unknown."""
    warnings: Sequence[str]

    def dump(self) -> dict[str, Any]:
        """Return JSON data with the keys ``data``, ``estimate`` and ``warnings``; unknown costs are null."""
        costs = dict.fromkeys(field.name for field in fields(Costs)) if self.costs is None else vars(self.costs)
        return {
            "data": dict(self.data),
            "estimate": {"prompts": self.prompts, "iterations": self.iterations, **costs},
            "warnings": list(self.warnings),
        }


def estimate(config: RunConfig, reporter: Reporter, *, out: Path = Path(), offline: bool = False) -> Estimate:
    """Check all inputs and the model's configuration, and estimate the cost of the run.

    Args:
        config: Configuration of the run.
        reporter: Receives progress.
        out: Run directory, which need not exist; its disk must have room for the run.
        offline: Load nothing of the model, not even its configuration, and take its size from its
            name; missing prompts are a warning instead of an error.

    Raises:
        CsrError: The prompts cannot be read, none of them can be used or, unless offline, the model
            does not exist.
    """
    require_libraries(config, offline=offline)
    warnings: list[str] = []
    report = InputReport()
    missing = [source for source in config.data.all_sources if offline and not is_local(source)]
    if missing:
        report.accepted = config.data.limit or _ASSUMED_PROMPTS
        warnings.append(f"{', '.join(missing)} does not exist yet; the estimate assumes {report.accepted} prompts")
        data = report.dump()
    else:
        data = _check_data(config, report, reporter, None if offline else ProcessorCheck.of_run(config))
    if not report.accepted:
        raise no_usable_prompt(config.data, report)
    warnings += report.messages("prompts")
    shape = shape_from_name(config.model.path) if offline else shape_of(config.model)
    costs = None if shape is None else costs_of(config, shape, report.accepted)
    if costs is None:
        warnings.append(
            f"the size of {config.model.path} is not in its name; without --offline its configuration is read"
        )
    else:
        warnings += _cost_warnings(config, costs, out)
    if config.model.adapter is not None and not Path(config.model.adapter).is_dir():
        warnings.append(f"model.adapter {config.model.adapter} does not exist")
    return Estimate(data, report.accepted, config.iterations, costs, warnings)


def _check_data(config: RunConfig, report: InputReport, reporter: Reporter, model: ModelCheck | None) -> dict[str, Any]:
    """Read all prompts and external pairs, and fill the report; return both reports as JSON data."""
    with reporter.stage("checking prompts and images", count_rows(config.data)) as progress:
        tick = partial(progress.advance, 1)
        for _ in read_prompts(config.data, report, seed=config.seed, tick=tick, model=model):
            pass
    data = report.dump()
    if config.data.pairs is not None:
        data["pairs"] = check_pairs(config.data, reporter, model=model).dump()
    return data


def costs_of(config: RunConfig, shape: Shape, num_prompts: int) -> Costs:
    """Compute the cost of a run from the shape of its model and its number of prompts."""
    device = resolve_device(config.model.device)
    dtype = resolve_dtype(config.model.dtype, device)
    search = config.method.search
    beam = search.keep_top + search.keep_bottom
    nodes = num_prompts * (1 + (search.max_sentences - 1) * beam) * search.num_candidates
    weights = shape.parameters * (_NF4_BYTES if config.model.quantization else _BYTES[dtype])
    row = (_PROMPT_TOKENS + search.max_sentences * _SENTENCE_TOKENS) * shape.layers * shape.cache_width
    rows = min(config.generation.max_rows, max(num_prompts, 1) * beam * search.num_candidates)
    lora = shape.lora_parameters(config.training.lora.r)
    bytes_per_weight = _NF4_BYTES if config.model.quantization else _BYTES[dtype]
    training_memory = _trained(shape).memory_bytes(config.training.max_tokens, lora, bytes_per_weight, _BYTES[dtype])
    ledger = nodes * _NODE_BYTES
    disk = float(config.iterations * (ledger + 4 * lora) + 4 * lora)
    if config.training.merge:
        disk += shape.parameters * _BYTES[dtype]
    return Costs(
        parameters=shape.parameters,
        device=device,
        weights_gb=round(weights / 1e9, 3),
        search_memory_gb=round((weights + rows * row * _BYTES[dtype]) / 1e9, 2),
        training_memory_gb=round(training_memory / 1e9, 2),
        sentences_per_iteration=nodes,
        ledger_mb=round(ledger / 1e6, 1),
        disk_gb=round(disk / 1e9, 3),
        **_hours(config, shape, num_prompts, nodes, measured_flops(device, dtype)),
    )


def _hours(config: RunConfig, shape: Shape, num_prompts: int, nodes: int, flops: float) -> dict[str, float]:
    """Bound the hours of one iteration's long stages, on this device and on an A100.

    A forward pass takes 2 operations per parameter and token; :mod:`csr_vlm.pipeline.training_cost` has those
    of training, where all pairs of a prompt share their tokens.
    """
    search, pairs = config.method.search, config.method.pairs
    num_questions = num_prompts * pairs.questions.per_prompt
    response = search.max_sentences * _SENTENCE_TOKENS
    is_sibling = pairs.between == "siblings"
    tree = TreeShape(
        prompt=_PROMPT_TOKENS,
        path=response if is_sibling else 0,
        pairs=pairs.per_prompt,
        sentence=_SENTENCE_TOKENS if is_sibling else response,
        questions=num_questions // max(num_prompts, 1),
    )
    lora = shape.lora_parameters(config.training.lora.r)
    trees = num_prompts * float(config.training.trl.get("num_train_epochs", 3))
    stages = {
        "search": 2.0 * nodes * search.max_sentence_tokens * shape.parameters,
        "question": 2.0 * 2 * num_questions * _PROMPT_TOKENS * shape.parameters,
        "training": trees * _trained(shape).tree_operations(tree.tokens, tree.targets, lora),
    }
    hours = {}
    for stage, operations in stages.items():
        hours[f"{stage}_hours"] = round(operations / flops / 3600, 4)
        hours[f"{stage}_hours_a100"] = round(operations / _A100_FLOPS / 3600, 4)
    return hours


def _trained(shape: Shape) -> TrainedModel:
    """Return the shape with all parameters in the layers, an upper bound."""
    return TrainedModel(shape.parameters, shape.parameters, shape.layers, shape.width, vocabulary=0)


def _cost_warnings(config: RunConfig, costs: Costs, out: Path) -> list[str]:
    """Warn about what would stop a run hours after it began."""
    warnings = []
    if costs.device == "cpu" and costs.parameters > 3e8:
        warnings.append("no GPU: a model of this size takes days on a CPU")
    elif costs.search_hours > _LONG_SEARCH_HOURS:
        warnings.append(
            f"the search of one iteration may take {costs.search_hours:.0f} hours; set data.limit to shorten it"
        )
    if costs.device.startswith("cuda"):
        memory = torch.cuda.get_device_properties(costs.device).total_memory / 1e9
        if costs.search_memory_gb > memory:
            warnings.append(f"the search may need more than the GPU's {memory:.0f} GB; lower generation.max_rows")
        if costs.training_memory_gb > memory:
            warnings.append(
                f"training may need more than the GPU's {memory:.0f} GB; lower training.max_tokens or training.lora.r"
            )
    disk = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(disk).free / 1e9
    if costs.disk_gb > free:
        warnings.append(f"the run may write {costs.disk_gb:.0f} GB, but only {free:.0f} GB are free on this disk")
    return warnings


def shape_from_name(path: str) -> Shape | None:
    """Guess a model's shape from the size in its name, such as 7b or 500M; None if the name has no size.

    Example:
        >>> shape_from_name("llava-hf/llava-1.5-7b-hf").parameters
        7000000000
    """
    match = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", Path(path).name, re.IGNORECASE)
    if match is None:
        return None
    return Shape.of_size(round(float(match[1]) * {"b": 1e9, "m": 1e6}[match[2].lower()]))


def shape_of(config: ModelConfig) -> Shape:
    """Read a model's shape from its configuration, without reading weights.

    Raises:
        CsrError: The model does not exist or is not an image-text-to-text model.
    """
    require_on_disk_or_reachable("model.path", config.path, config.revision)
    try:
        model_config = AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        require_image_text_to_text(model_config, config.path)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(model_config, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise load_error("model", config.path, error) from None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    text = model_config.get_text_config()
    num_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shape(parameters, text.num_hidden_layers, text.hidden_size, 2 * num_heads * head_width)


def measured_flops(device: str, dtype: str) -> float:
    """Measure the throughput of matrix products on the device, in floating-point operations per second."""
    size = 4096 if device.startswith("cuda") else 512
    left = torch.randn(size, size, dtype=getattr(torch, dtype), device=device)
    rates = []
    for _ in range(5):
        started = time.perf_counter()
        product = left @ left
        float(product[0, 0])  # Wait for the GPU.
        rates.append(2 * size**3 / (time.perf_counter() - started))
    return sorted(rates)[2]
