"""What a run would cost, found out before any weight is read.

The figures are upper bounds from the shapes of search and model, and orders of magnitude
for the time; they are there so that a mistake of a factor of ten is seen at once.
"""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from csr_vlm.config.schema import ModelConfig, RunConfig
from csr_vlm.core.progress import Reporter
from csr_vlm.data.prompts import InputReport, count_rows, no_usable_prompt, read_prompts
from csr_vlm.data.sources import is_local
from csr_vlm.models.devices import resolve_device, resolve_dtype
from csr_vlm.models.load_errors import load_error, require_image_text_to_text
from csr_vlm.pipeline.offline_pairs import check_pairs

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_NF4_BYTES = 0.6
"""A weight in 4 bits with its share of scales and of the parts that are not quantised."""
_NODE_BYTES = 400
"""Of one ledger row, compressed; measured on LLaVA-like sentences of 20 tokens."""
_PROMPT_TOKENS = 700
"""Of a picture (576 in LLaVA-1.5) and a question."""
_SENTENCE_TOKENS = 25
"""Of a usual sentence; the configured number is only its limit."""
_A100_FLOPS = 1e14
"""What one A100 reaches in large batches of half-precision decoding, floating-point operations a second."""
_LONG_SEARCH_HOURS = 24.0


@dataclass(frozen=True)
class Shape:
    """As much of a model's shape as costs follow from."""

    parameters: int
    layers: int
    width: int
    cache_width: int
    """Keys and values of one token in one layer, in numbers."""

    @classmethod
    def of_size(cls, parameters: int) -> Shape:
        """Guess the shape of a Llama-like model: 12 layers * width^2 parameters, width = 128 layers."""
        layers = max(round((parameters / (12 * 128**2)) ** (1 / 3)), 1)
        return cls(parameters, layers, 128 * layers, 2 * 128 * layers)

    def lora_parameters(self, rank: int) -> int:
        """Count an adapter's on all seven linear maps of a layer: about 19 r widths a layer."""
        return 19 * rank * self.width * self.layers


def estimate(config: RunConfig, reporter: Reporter, *, offline: bool = False) -> dict[str, Any]:
    """Check the data completely and the model's configuration, and count what a run would do.

    Args:
        offline: Look at no model, not even its configuration, and take the model's size from
            its name; prompts that are not there yet are warned about instead of refused.

    Returns:
        ``data`` (accepted and dropped prompts, and pairs from outside), ``estimate`` and ``warnings``.

    Raises:
        CsrError: The prompts cannot be read, none can be used or, unless offline, there is no such model.
    """
    from csr_vlm.training.dpo import check_arguments

    check_arguments(config.training)
    warnings: list[str] = []
    report = InputReport()
    missing = [source for source in config.data.all_sources if offline and not is_local(source)]
    if missing:
        number = config.data.limit or 1000
        warnings.append(f"{', '.join(missing)} is not there yet; the figures are for {number} prompts")
        report.accepted = number
        found = report.dump()
    else:
        found = _check_data(config, report, reporter)
    if not report.accepted:
        raise no_usable_prompt(config.data, report)
    if report.dropped:
        warnings.append(f"{report.dropped.total()} prompts would be dropped: {dict(report.dropped)}")
    shape = shape_from_name(config.model.path) if offline else shape_of(config.model)
    if shape is None:
        warnings.append(f"{config.model.path} does not tell its size; without --offline its configuration is read")
        costs: dict[str, Any] = {}
    else:
        costs = _costs(config, shape, report.accepted)
        warnings += _too_much(config, shape, costs)
    if config.model.adapter is not None and not Path(config.model.adapter).is_dir():
        warnings.append(f"there is no adapter in {config.model.adapter}")
    return {
        "data": found,
        "estimate": {"prompts": report.accepted, "iterations": config.iterations, **costs},
        "warnings": warnings,
    }


def _check_data(config: RunConfig, report: InputReport, reporter: Reporter) -> dict[str, Any]:
    """Read all prompts and pairs; the report is filled in passing."""
    with reporter.stage("checking prompts and images", count_rows(config.data)) as progress:
        for _ in read_prompts(config.data, report, seed=config.seed, tick=lambda: progress.advance(1)):
            pass
    found = report.dump()
    if config.data.pairs is not None:
        found["pairs"] = check_pairs(config.data, reporter).dump()
    return found


def _costs(config: RunConfig, shape: Shape, num_prompts: int) -> dict[str, Any]:
    device = resolve_device(config.model.device)
    dtype = resolve_dtype(config.model.dtype, device)
    search = config.method.search
    beam = search.keep_top + search.keep_bottom
    nodes = num_prompts * (1 + (search.max_sentences - 1) * beam) * search.num_candidates
    weights = shape.parameters * (_NF4_BYTES if config.model.quantization else _BYTES[dtype])
    row = (_PROMPT_TOKENS + search.max_sentences * _SENTENCE_TOKENS) * shape.layers * shape.cache_width
    rows = min(config.generation.max_rows, max(num_prompts, 1) * beam * search.num_candidates)
    lora = shape.lora_parameters(config.training.lora.r)
    batch = 2 * int(config.training.trl.get("per_device_train_batch_size", 8))
    # Checkpointed activations, one a layer, and one layer's own; half precision on a GPU.
    activations = batch * _PROMPT_TOKENS * shape.width * (shape.layers + 34) * _BYTES[dtype]
    ledger = nodes * _NODE_BYTES
    disk = float(config.iterations * (ledger + 4 * lora) + 4 * lora)
    if config.training.merge:
        disk += shape.parameters * _BYTES[dtype]
    return {
        "parameters": shape.parameters,
        "device": device,
        "weights, GB": round(weights / 1e9, 3),
        "search memory, GB at most": round((weights + rows * row * _BYTES[dtype]) / 1e9, 2),
        # Adapter, its gradient and Adam's two moments in float32.
        "training memory, GB about": round((weights + 16 * lora + activations) / 1e9, 2),
        "sentences an iteration, at most": nodes,
        "ledger an iteration, MB at most": round(ledger / 1e6, 1),
        "disk, GB at most": round(disk / 1e9, 3),
        **_times(config, shape, num_prompts, nodes, measured_flops(device, dtype)),
    }


def _times(config: RunConfig, shape: Shape, num_prompts: int, nodes: int, flops: float) -> dict[str, float]:
    """Bound the time of an iteration's long stages here and on an A100."""
    search, pairs = config.method.search, config.method.pairs
    asked = num_prompts * pairs.questions.per_prompt if pairs.questions.pattern else 0
    length = _PROMPT_TOKENS + search.max_sentences * _SENTENCE_TOKENS
    epochs = float(config.training.trl.get("num_train_epochs", 3))
    # Operations a parameter and token: two forward; six with the way back and the activations that it needs again.
    operations = {
        "search": 2.0 * nodes * search.max_sentence_tokens,
        "asking": 2.0 * 2 * asked * _PROMPT_TOKENS,
        "training": 6.0 * 2 * epochs * (num_prompts * pairs.per_prompt * length + asked * _PROMPT_TOKENS),
    }
    found = {}
    for stage, number in operations.items():
        seconds = number * shape.parameters
        found[f"{stage} an iteration, minutes at most"] = round(seconds / flops / 60, 1)
        found[f"{stage} an iteration on an A100, hours at most"] = round(seconds / _A100_FLOPS / 3600, 2)
    return found


def _too_much(config: RunConfig, shape: Shape, costs: dict[str, Any]) -> list[str]:
    """Word what would stop a run hours after it began."""
    warnings = []
    if costs["device"] == "cpu" and shape.parameters > 3e8:
        warnings.append("no GPU: a model of this size takes days on a CPU")
    elif (hours := costs["search an iteration, minutes at most"] / 60) > _LONG_SEARCH_HOURS:
        warnings.append(f"the search of one iteration may take {hours:.0f} hours; data.limit makes it shorter")
    if costs["device"].startswith("cuda"):
        memory = torch.cuda.get_device_properties(costs["device"]).total_memory / 1e9
        if costs["search memory, GB at most"] > memory:
            warnings.append(f"the search may need more than the GPU's {memory:.0f} GB; lower generation.max_rows")
        if costs["training memory, GB about"] > memory:
            warnings.append(f"training may need more than the GPU's {memory:.0f} GB; lower its batch size or the rank")
    free = shutil.disk_usage(".").free / 1e9
    if costs["disk, GB at most"] > free:
        warnings.append(f"the run may write {costs['disk, GB at most']:.0f} GB, and {free:.0f} GB are free here")
    return warnings


def shape_from_name(path: str) -> Shape | None:
    """Read a model's size from its name, such as 7b or 500M; None where it does not tell.

    Example:
        >>> shape_from_name("llava-hf/llava-1.5-7b-hf").parameters
        7000000000
    """
    found = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", Path(path).name, re.IGNORECASE)
    if found is None:
        return None
    return Shape.of_size(round(float(found[1]) * {"b": 1e9, "m": 1e6}[found[2].lower()]))


def shape_of(config: ModelConfig) -> Shape:
    """Read a model's shape from its configuration alone; no weight is read.

    Raises:
        CsrError: There is no such model, or it is not an image-text-to-text model.
    """
    try:
        loaded = AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        require_image_text_to_text(loaded, config.path)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(loaded, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise load_error("model", config.path, error) from None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    text = loaded.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shape(parameters, text.num_hidden_layers, text.hidden_size, 2 * heads * head)


def measured_flops(device: str, dtype: str) -> float:
    """Measure matrix products on the device for a moment, in floating-point operations a second."""
    size = 4096 if device.startswith("cuda") else 512
    left = torch.randn(size, size, dtype=getattr(torch, dtype), device=device)
    rates = []
    for _ in range(5):
        started = time.perf_counter()
        product = left @ left
        float(product[0, 0])  # Waits for a GPU.
        rates.append(2 * size**3 / (time.perf_counter() - started))
    return sorted(rates)[2]
