"""What a run would cost, found out before any weight is read.

The figures are upper bounds from the search's shape and orders of magnitude for the time;
they are there so that a mistake of a factor of ten is seen at once.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from csr_vlm.config import ModelConfig, RunConfig
from csr_vlm.data.prompts import InputReport, count_rows, read_prompts
from csr_vlm.external import check_pairs
from csr_vlm.loading import resolve_device, resolve_dtype, unloadable
from csr_vlm.progress import Reporter

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_NODE_BYTES = 400
"""Of one ledger row, compressed; measured on LLaVA-like sentences of 20 tokens."""


def estimate(config: RunConfig, tell: Reporter) -> dict[str, Any]:
    """Check the data completely and the model's configuration, and count what a run would do.

    Returns:
        ``data`` (accepted and dropped prompts, and pairs from outside), ``estimate`` and ``warnings``.
    """
    report = InputReport()
    with tell.stage("checking prompts and images", count_rows(config.data)) as advance:
        for _ in read_prompts(config.data, report, seed=config.seed, tick=lambda: advance(1)):
            pass
    found = report.dump()
    if config.data.pairs is not None:
        found["pairs"] = check_pairs(config.data, tell).dump()
    parameters = count_parameters(config.model)
    device = resolve_device(config.model.device)
    dtype = resolve_dtype(config.model.dtype, device)
    search = config.method.search
    beam = search.keep_top + search.keep_bottom
    expansions = report.accepted * (1 + (search.max_sentences - 1) * beam)
    nodes = expansions * search.num_candidates
    tokens = nodes * search.max_sentence_tokens
    # A forward pass costs two floating-point operations a parameter and token.
    seconds = 2.0 * parameters * tokens / measured_flops(device, dtype)
    warnings = []
    if not report.accepted:
        warnings.append(f"no usable prompt: {'; '.join(report.examples[:3])}")
    elif report.dropped:
        warnings.append(f"{report.dropped.total()} prompts would be dropped: {dict(report.dropped)}")
    if device == "cpu" and parameters > 3e8:
        warnings.append("no GPU: a model of this size takes days on a CPU")
    return {
        "data": found,
        "estimate": {
            "prompts": report.accepted,
            "iterations": config.iterations,
            "parameters": parameters,
            "device": device,
            "weights, GB": round(parameters * _BYTES[dtype] / 1e9, 3),
            "sentences an iteration, at most": nodes,
            "ledger an iteration, MB at most": round(nodes * _NODE_BYTES / 1e6, 1),
            "search an iteration, minutes at most": round(seconds / 60, 1),
        },
        "warnings": warnings,
    }


def count_parameters(config: ModelConfig) -> int:
    """Count a model's parameters from its configuration alone; no weight is read.

    Raises:
        CsrError: There is no such model, or it is not an image-text-to-text model.
    """
    try:
        loaded = AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(loaded, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise unloadable("model", config.path, error) from None
    return sum(parameter.numel() for parameter in model.parameters())


def measured_flops(device: str, dtype: str) -> float:
    """Measure matrix products on the device for a moment, in floating-point operations a second."""
    size = 4096 if device == "cuda" else 512
    left = torch.randn(size, size, dtype=getattr(torch, dtype), device=device)
    rates = []
    for _ in range(5):
        started = time.perf_counter()
        product = left @ left
        float(product[0, 0])  # Waits for a GPU.
        rates.append(2 * size**3 / (time.perf_counter() - started))
    return sorted(rates)[2]
