"""Measure sentence search on a GPU with the architecture of LLaVA-1.5-7B and random weights.

    python benchmarks/gpu.py --json build/gpu.json            # LLaVA-1.5-7B in bfloat16
    python benchmarks/gpu.py --tiny --rows 30 60              # a small model on any device

For each maximum number of rows, the benchmark reports tokens per second, prompts per hour, peak
memory, and two shares of the device's capacity. Bandwidth: the bytes that a step must read (weights,
and once the keys and values of each prompt in flight) per second, relative to a measured copy.
Arithmetic: two operations per weight and token, per second, relative to a measured matrix product.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from engine import CANDIDATES, ForcedSampler, Lengths, best, search_with
from models import SIZES, Size, make_policy, make_prompts

from csr_vlm.cli.console import quiet_libraries
from csr_vlm.core.records import Prompt
from csr_vlm.generation.counters import Counters
from csr_vlm.generation.scheduler import Scheduler
from csr_vlm.generation.shared_model import SharedModel
from csr_vlm.models.policy import Policy

BEAM = 3


def bandwidth(device: str, dtype: torch.dtype) -> float:
    """Measure the bandwidth of a large copy, in bytes read and written per second."""
    elements = 2**29 if device == "cuda" else 2**24
    source = torch.zeros(elements, dtype=dtype, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        float(target[0])  # waits for the device

    return 2 * source.nbytes / best(copy)


def arithmetic(device: str, dtype: torch.dtype) -> float:
    """Measure the speed of a large matrix product, in operations per second."""
    side = 8192 if device == "cuda" else 1024
    left = torch.randn(side, side, dtype=dtype, device=device)
    return 2 * side**3 / best(lambda: float((left @ left)[0, 0]))


def measure(policy: Policy, prompts: list[Prompt], max_rows: int, peaks: dict[str, float]) -> dict[str, Any]:
    """Run a search once to warm up and once timed."""
    device = policy.device.type
    model = policy.base_model
    in_flight = max(max_rows // (BEAM * CANDIDATES), 1)
    searched = prompts[: 2 * in_flight]
    seconds = 0.0
    counters = Counters()
    for batch in (searched[:in_flight], searched):
        counters = Counters()
        scheduler = Scheduler(
            SharedModel(policy, counters), ForcedSampler(policy, Lengths(vary=True)), max_rows=max_rows,
            max_prompts=in_flight,
        )  # fmt: skip
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        started = time.perf_counter()
        candidates = search_with(scheduler, batch)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    decoder = model.get_decoder()
    weights = sum(parameter.numel() for parameter in decoder.layers.parameters())
    head = model.get_output_embeddings().weight.numel()
    config = decoder.config
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    prompt_tokens = counters.prefill_tokens / len(searched)
    steps = counters.forwards
    read_bytes = steps * ((weights + head) * model.dtype.itemsize + in_flight * prompt_tokens * token_bytes)
    operations = 2 * (counters.prefill_tokens + counters.decode_tokens) * weights + 2 * counters.decode_tokens * head
    new_tokens = sum(len(candidate.token_ids) for _, candidate in candidates)
    return {
        "rows at most": max_rows,
        "prompts": len(searched),
        "seconds": round(seconds, 2),
        "new tokens/s": round(new_tokens / seconds, 1),
        "prompts/h": round(3600 * len(searched) / seconds, 1),
        "rows a step": round(counters.decode_tokens / steps, 1),
        "share of bandwidth": round(read_bytes / seconds / peaks["bytes/s"], 3),
        "share of arithmetic": round(operations / seconds / peaks["operations/s"], 3),
        "peak memory, GB": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device == "cuda" else None,
        "vision encodes a prompt": counters.vision_encodes / len(searched),
        "prefill tokens a prompt": prompt_tokens,
    }


def main() -> None:
    """Measure every maximum number of rows that fits into memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="use a small model, to try the command")
    parser.add_argument("--rows", type=int, nargs="+", default=[60, 120, 240, 480, 960])
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    arguments = parser.parse_args()
    quiet_libraries()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.tiny:
        sys.exit("no CUDA device found; use --tiny to run on a CPU")
    size: Size = SIZES["tiny" if arguments.tiny else "7b"]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    peaks = {"bytes/s": bandwidth(device, dtype), "operations/s": arithmetic(device, dtype)}
    machine = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    rows: list[dict[str, Any]] = [{"device": machine, "dtype": str(dtype), **peaks}]
    print(json.dumps(rows[0]), flush=True)
    policy = make_policy(size, dtype, device)
    with tempfile.TemporaryDirectory() as directory:
        num_prompts = 2 * max(max(arguments.rows) // (BEAM * CANDIDATES), 1)
        prompts = make_prompts(Path(directory), num_prompts, size.image)
        for max_rows in arguments.rows:
            try:
                rows.append(measure(policy, prompts, max_rows, peaks))
            except torch.OutOfMemoryError:
                rows.append({"rows at most": max_rows, "error": "out of memory"})
                torch.cuda.empty_cache()
            print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
