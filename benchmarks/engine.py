"""Compare sentence search with the published procedure and with the arithmetic lower bound.

    python benchmarks/engine.py tiny mid-fp32 mid-bf16 --repeats 3 --json build/engine.json

Both build trees of the same shape: per prompt, 16 expansions of 5 candidates, keeping the best and
the two worst sentences of each round. The baseline is the published procedure: one ``generate`` call
per node, which encodes the image, processes prompt and prefix again, samples 5 sequences and stops
each at the end of its sentence. Sentences have 20 tokens, or 5 to 35 with the same mean. Runs are
interleaved; medians and their ratio are reported.

The floor is the time of the matrix products and attention alone, for exactly the tokens that the
engine processes, each measured at its fastest batch size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from memory import megabytes
from models import SIZES, make_policy, make_prompts
from transformers import StoppingCriteria, StoppingCriteriaList

from csr_vlm.cli.console import quiet_libraries
from csr_vlm.core.records import Candidate, Expansion, Finish, Prompt
from csr_vlm.generation.counters import Counters
from csr_vlm.generation.decoding import DecodingSettings, PartialCandidate, TokenSampler
from csr_vlm.generation.sampling import uniforms
from csr_vlm.generation.scheduler import Scheduler
from csr_vlm.generation.shared_model import SharedModel
from csr_vlm.method.search import Proposer
from csr_vlm.models.policy import Policy

CANDIDATES, ROUNDS = 5, 6
CASES = {"tiny": ("tiny", torch.float32), "mid-fp32": ("mid", torch.float32), "mid-bf16": ("mid", torch.bfloat16)}
PROMPTS = {"tiny": 32, "mid": 16}
"""Number of prompts that the engine has in flight."""
LONGEST = 35
TARGETS = {
    ("tiny", False): {"ratio": 15, "share of floor": 0.45},
    ("tiny", True): {"ratio": 10},
    ("mid-fp32", False): {"ratio": 22, "share of floor": 0.70},
    ("mid-fp32", True): {"ratio": 16},
    ("mid-bf16", False): {"ratio": 28, "share of floor": 0.55},
    ("mid-bf16", True): {"ratio": 16},
}
"""Targets, by case and whether lengths vary."""
MOST_GROWTH = 1.10
"""Largest accepted growth factor of peak memory, relative to the first number of prompts."""


@dataclass(frozen=True)
class Lengths:
    """Choose the number of tokens of sentences: always 20, or 5 to 35 from the candidate's seed."""

    vary: bool

    def of(self, seed: tuple[int | str, ...], index: int) -> int:
        return 5 + int(31 * uniforms((*seed, index, "length"), 1)[0]) if self.vary else 20


class ForcedSampler(TokenSampler):
    """Sample as usual, but end sentences after a given number of tokens."""

    def __init__(self, policy: Policy, lengths: Lengths) -> None:
        super().__init__(policy, DecodingSettings(max_new_tokens=LONGEST + 1, rule=None, temperature=1.0))
        self._lengths = lengths
        self._wanted: dict[tuple[int, int], int] = {}

    def start(self, request: Expansion) -> list[PartialCandidate]:
        started = super().start(request)
        self._wanted |= {
            (c.group_id, c.sibling_index): self._lengths.of(request.seed, c.sibling_index) for c in started
        }
        return started

    def append(self, candidate: PartialCandidate, token: int, logprob: float) -> None:
        if len(candidate.token_ids) == self._wanted[candidate.group_id, candidate.sibling_index]:
            candidate.finish = Finish.DELIMITER
            return
        candidate.token_ids.append(token)
        candidate.logprobs.append(logprob)


def root(prompt: Prompt) -> Expansion:
    return Expansion(prompt, "", (), CANDIDATES, (0, prompt.prompt_id, ""))


def children(prompt: Prompt, groups: Sequence[tuple[Expansion, Sequence[Candidate]]]) -> list[Expansion]:
    """Expand the best and the two worst candidates of a round, by mean logprob per token."""
    ranked = [(request, index, candidate) for request, siblings in groups for index, candidate in enumerate(siblings)]
    ranked.sort(key=lambda item: -item[2].logprob / len(item[2].token_ids))
    kept = []
    for request, index, candidate in (ranked[0], ranked[-2], ranked[-1]):
        node = f"{request.node_id}.{index}".lstrip(".")
        ids = request.prefix_ids + candidate.token_ids
        kept.append(Expansion(prompt, node, ids, CANDIDATES, (0, prompt.prompt_id, node)))
    return kept


def search_with(proposer: Proposer, prompts: Sequence[Prompt]) -> list[tuple[Expansion, Candidate]]:
    """Build every prompt's tree; return every candidate with the expansion that it belongs to."""
    rounds = {prompt.prompt_id: 1 for prompt in prompts}
    candidates: list[tuple[Expansion, Candidate]] = []
    proposer.submit([root(prompt) for prompt in prompts])
    while rounds:
        by_prompt: dict[str, list[Any]] = {}
        for request, siblings in proposer.collect():
            by_prompt.setdefault(request.prompt.prompt_id, []).append((request, siblings))
            candidates += [(request, candidate) for candidate in siblings]
        for prompt_id, groups in by_prompt.items():
            if rounds[prompt_id] == ROUNDS:
                del rounds[prompt_id]
                proposer.release(prompt_id)
            else:
                rounds[prompt_id] += 1
                proposer.submit(children(groups[0][0].prompt, groups))
    return candidates


class _StopAtLengths(StoppingCriteria):
    def __init__(self, start: int, lengths: Sequence[int]) -> None:
        self._ends = torch.tensor(lengths) + start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return self._ends.to(input_ids.device) <= input_ids.shape[1]


class OneCallPerNode:
    """Implement the published procedure as a proposer."""

    def __init__(self, policy: Policy, lengths: Lengths) -> None:
        self._policy = policy
        self._lengths = lengths
        self._requests: list[Expansion] = []

    def submit(self, requests: Sequence[Expansion]) -> None:
        self._requests += requests

    def release(self, prompt_id: str) -> None:
        pass

    def collect(self) -> list[tuple[Expansion, list[Candidate]]]:
        requests, self._requests = self._requests, []
        return [(request, self._generate(request)) for request in requests]

    @torch.inference_mode()
    def _generate(self, request: Expansion) -> list[Candidate]:
        encoded = [self._policy.encode(request.prompt)]
        inputs = self._policy.model_inputs(encoded, [request.prefix_ids], "left")
        del inputs["position_ids"]
        start = inputs["input_ids"].shape[1]
        lengths = [self._lengths.of(request.seed, index) for index in range(CANDIDATES)]
        output = self._policy.model.generate(
            **inputs,
            do_sample=True,
            num_return_sequences=CANDIDATES,
            max_new_tokens=max(lengths),
            eos_token_id=-1,
            pad_token_id=self._policy.pad_id,
            stopping_criteria=StoppingCriteriaList([_StopAtLengths(start, lengths)]),
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = output.sequences[:, start:]
        raw = torch.stack([torch.log_softmax(logits.float(), dim=-1) for logits in output.logits], dim=1)
        logprobs = raw.gather(-1, tokens[..., None]).squeeze(-1).tolist()
        return [
            Candidate(tuple(ids[:n]), tuple(scores[:n]), "", Finish.DELIMITER)
            for ids, scores, n in zip(tokens.tolist(), logprobs, lengths, strict=True)
        ]


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = ["wall"]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    clock = CLOCKS[_clock[0]]
    started = clock()
    result = work()
    return clock() - started, result


def best(work: Callable[[], Any], repeats: int = 5) -> float:
    """Return the shortest time of several runs, after a warm-up."""
    work()
    return min(timed(work)[0] for _ in range(repeats))


@torch.inference_mode()
def floor(
    policy: Policy, counters: Counters, candidates: Sequence[tuple[Expansion, Candidate]], prompt: Prompt
) -> float:
    """Compute the time in seconds that the arithmetic alone takes for the counted tokens."""
    model = policy.base_model
    encoded = [policy.encode(prompt)] * 8
    vision = best(lambda: policy.with_features(encoded), 3) / len(encoded)
    linear = [module for module in model.get_decoder().modules() if isinstance(module, torch.nn.Linear)]
    layers = sum(_seconds_per_row(module) for module in linear)
    head = _seconds_per_row(model.get_output_embeddings())
    length = len(encoded[0].input_ids)
    config = model.get_decoder().config
    pair = _seconds_per_pair(
        config.num_attention_heads, config.hidden_size // config.num_attention_heads, model, length
    )
    num_pairs = counters.vision_encodes * length * length / 2
    for request, candidate in candidates:
        new = len(candidate.token_ids)
        num_pairs += new * (length + len(request.prefix_ids)) + new * new / 2
    return (
        counters.vision_encodes * vision
        + (counters.prefill_tokens + counters.decode_tokens) * layers
        + counters.decode_tokens * head
        + config.num_hidden_layers * num_pairs * pair
    )


def _seconds_per_row(linear: torch.nn.Linear) -> float:
    weight = linear.weight
    times = []
    for rows in (64, 128, 256, 512, 1024):
        values = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
        times.append(best(lambda x=values: torch.nn.functional.linear(x, weight), 3) / rows)
    return min(times)


def _seconds_per_pair(heads: int, size: int, model: Any, keys: int) -> float:
    """Measure the time per query and key in one layer, all heads."""
    kv = torch.randn(8, heads, keys, size, dtype=model.dtype, device=model.device)
    times = []
    for rows in (16, 64, 256):
        query = torch.randn(8, heads, rows, size, dtype=model.dtype, device=model.device)
        seconds = best(lambda q=query: torch.nn.functional.scaled_dot_product_attention(q, kv, kv), 3)
        times.append(seconds / (8 * rows * keys))
    return min(times)


def worst_difference(
    policy: Policy, candidates: Sequence[tuple[Expansion, Candidate]], prompts: Sequence[Prompt]
) -> Any:
    """Compare candidates' logprobs with a teacher-forced pass, given the right prompt and another one."""
    checked = candidates[:: max(len(candidates) // 24, 1)]
    worst = {}
    for name, shift in (("own prompt", 0), ("another prompt", 1)):
        differences = []
        for request, candidate in checked:
            prompt = prompts[(prompts.index(request.prompt) + shift) % len(prompts)]
            (logprobs,) = policy.teacher_forced([prompt], [request.prefix_ids + candidate.token_ids])
            differences.append(abs(float(logprobs[len(request.prefix_ids) :].sum()) - candidate.logprob))
        worst[name] = max(differences) if shift == 0 else min(differences)
    return worst


def measure(case: str, vary: bool, repeats: int, scale: float) -> dict[str, Any]:
    """Measure one model with fixed or variable sentence lengths."""
    name, dtype = CASES[case]
    size, lengths = SIZES[name], Lengths(vary)
    policy = make_policy(size, dtype)
    num_prompts = max(int(PROMPTS[name] * scale), 1)
    engine_times, baseline_times = [], []
    with tempfile.TemporaryDirectory() as directory:
        prompts = make_prompts(Path(directory), num_prompts, size.image)
        for _ in range(repeats):
            seconds, _ = timed(lambda: search_with(OneCallPerNode(policy, lengths), prompts[:1]))
            baseline_times.append(seconds)
            counters = Counters()
            model = SharedModel(policy, counters)
            scheduler = Scheduler(
                model, ForcedSampler(policy, lengths), max_rows=num_prompts * 3 * CANDIDATES, max_prompts=num_prompts
            )
            seconds, candidates = timed(lambda s=scheduler: search_with(s, prompts))
            engine_times.append(seconds / num_prompts)
        arithmetic = floor(policy, counters, candidates, prompts[0]) / num_prompts
        exact = worst_difference(policy, candidates, prompts)
        prompt_tokens = sum(len(policy.encode(prompt).input_ids) for prompt in prompts)
    seconds = statistics.median(engine_times)
    assert counters.vision_encodes == num_prompts
    assert counters.prefill_tokens == prompt_tokens
    if dtype == torch.float32:
        assert exact["own prompt"] < 1e-4 * max(1, LONGEST / 20), exact
    row = {
        "case": case,
        "lengths": "5 to 35" if vary else "20",
        "prompts in flight": num_prompts,
        "published, s/prompt": round(statistics.median(baseline_times), 4),
        "engine, s/prompt": round(seconds, 4),
        "ratio": round(statistics.median(baseline_times) / seconds, 2),
        "floor, s/prompt": round(arithmetic, 4),
        "share of floor": round(arithmetic / seconds, 3),
        "log-probability difference": {key: float(f"{value:.2g}") for key, value in exact.items()},
        "vision encodes a prompt": counters.vision_encodes / num_prompts,
        "prefill tokens over prompt tokens": counters.prefill_tokens / prompt_tokens,
        "decode tokens": counters.decode_tokens,
        "forwards": counters.forwards,
        "peak memory, MB": round(megabytes("VmHWM"), 1),
    }
    targets = TARGETS[case, vary]
    return row | {"targets": targets, "missed": [name for name, least in targets.items() if row[name] < least]}


def peak_memory(num_prompts: int) -> float:
    """Run a shallow search for ``num_prompts`` prompts, in work items of 64; return the peak memory in MB."""
    size = SIZES["tiny"]
    policy = make_policy(size, torch.float32)
    model = SharedModel(policy, Counters())
    decoding = DecodingSettings(max_new_tokens=4, rule=None, temperature=1.0)
    with tempfile.TemporaryDirectory() as directory:
        for first in range(0, num_prompts, 64):
            number = min(64, num_prompts - first)
            prompts = make_prompts(Path(directory), number, size.image, first, num_images=64)
            scheduler = Scheduler(model, TokenSampler(policy, decoding), max_rows=160, max_prompts=16)
            scheduler.submit([replace(root(prompt), num_candidates=2) for prompt in prompts])
            num_left = number
            while num_left:
                answered = {request.prompt.prompt_id for request, _ in scheduler.collect()}
                for prompt_id in answered:
                    scheduler.release(prompt_id)
                num_left -= len(answered)
    return megabytes("VmHWM")


def main() -> None:
    """Run the selected cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"any of {', '.join(CASES)}; all by default, unless --memory is given")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--lengths", choices=["fixed", "variable", "both"], default="both")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="use cpu on a busy machine, with one thread"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the prompts in flight")
    parser.add_argument(
        "--memory",
        type=int,
        nargs="+",
        default=[],
        metavar="PROMPTS",
        help="measure peak memory for these numbers of prompts",
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    parser.add_argument("--only-memory", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(arguments.threads)
    _clock[0] = arguments.clock
    if arguments.only_memory:
        print(peak_memory(arguments.only_memory))
        return
    rows = []
    for case in arguments.cases or ([] if arguments.memory else CASES):
        for vary in {"fixed": [False], "variable": [True], "both": [False, True]}[arguments.lengths]:
            rows.append(measure(case, vary, arguments.repeats, arguments.scale))
            print_row(rows[-1])
    for number in arguments.memory:
        command = [sys.executable, __file__, "--only-memory", str(number)]
        peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        first = next((row["peak memory, MB"] for row in rows if row["case"] == "memory"), peak)
        missed = ["peak memory, MB"] if peak > MOST_GROWTH * first else []
        rows.append({"case": "memory", "prompts": number, "peak memory, MB": round(peak, 1), "missed": missed})
        print_row(rows[-1])
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def print_row(row: dict[str, Any]) -> None:
    """Print a row as a small table and as one line of JSON."""
    for key, value in row.items():
        print(f"{key:<36}{value}", file=sys.stderr)
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
