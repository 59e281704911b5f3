"""Measure how many of the rows that a search may decode at once are live, with the real scheduler and no model.

    python benchmarks/occupancy.py --prompts 256 --part 16 --rows 80

Responses have 4 to 8 sentences of 8 to 35 tokens, as LLaVA's have; candidates and beam are those of
the default preset. The model is replaced by one that computes nothing, so every decoding step of
the search happens, in the order in which it would on a GPU, and takes no time. The benchmark
searches the work items one after another with one prompt for each full beam of rows, as on a CPU,
and then as one stream with two, as on a GPU. The trees must be equal to the last node.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from csr_vlm.config.schema import MethodConfig
from csr_vlm.core.batching import PROMPTS_PER_FULL_BEAM, batched
from csr_vlm.core.records import Candidate, Expansion, Finish, Prompt
from csr_vlm.generation.counters import Counters
from csr_vlm.generation.decoding import PartialCandidate
from csr_vlm.generation.sampling import uniforms
from csr_vlm.generation.scheduler import Scheduler
from csr_vlm.method.search import Proposer, Score, ScoreClaims, Search, Tree
from csr_vlm.pipeline.item_stream import ItemStream, OpenItem

ROUNDS, TOKENS = (4, 8), (8, 35)
"""Fewest and most sentences of a response, and tokens of a sentence."""
TARGET = 0.85
"""Share of the rows that should be live."""
METHOD = MethodConfig()


def between(limits: tuple[int, int], *seed: int | str) -> int:
    """Draw a number between two, both included, from a seed."""
    least, most = limits
    return least + int((most - least + 1) * uniforms(seed, 1)[0])


class NoModel:
    """Compute nothing, and record the live rows of each step."""

    def __init__(self) -> None:
        self.policy = SimpleNamespace(
            device=torch.device("cpu"), reuses_features=False, encode=lambda prompt: SimpleNamespace(input_ids=[1, 2])
        )
        self.counters = Counters()
        self.rows: list[int] = []

    def prefill(self, encoded: Sequence[Any], prefixes: Sequence[Sequence[int]]) -> list[Any]:
        kv, hidden = torch.zeros(1, 2, 1, 2, 1), torch.zeros(1)
        return [SimpleNamespace(kv=kv, hidden_state=hidden, next_position=2) for _ in encoded]

    def decode(self, tokens: torch.Tensor, positions: torch.Tensor, decode_step: Any) -> torch.Tensor:
        self.rows.append(len(tokens))
        return torch.zeros(len(tokens), 1)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


@dataclass(slots=True)
class Drawn(PartialCandidate):
    """Represent a candidate whose length and end are drawn when it starts."""

    length: int = 0
    is_last: bool = False
    first: int = 0
    """Its first token; the others count on."""


class DrawnSampler:
    """End each sentence after a number of tokens that depends on its seed alone."""

    def start(self, request: Expansion) -> list[PartialCandidate]:
        depth = request.node_id.count(".") + 1 + bool(request.node_id)
        is_last = depth >= between(ROUNDS, request.prompt.prompt_id, "rounds")
        seeds = [(*request.seed, index) for index in range(request.num_candidates)]
        return [
            Drawn(
                0, index, request.prefix_ids, np.empty(0),
                length=between(TOKENS, *seed, "length"), is_last=is_last, first=between((0, 9_999_999), *seed, "first"),
            )
            for index, seed in enumerate(seeds)
        ]  # fmt: skip

    def choose(self, logits: torch.Tensor, candidates: Sequence[Any]) -> torch.Tensor:
        for candidate in candidates:
            if len(candidate.token_ids) < candidate.length:
                candidate.token_ids.append(candidate.first + len(candidate.token_ids))
            elif candidate.is_last:
                candidate.token_ids.append(-1)
                candidate.finish = Finish.EOS
            else:
                candidate.finish = Finish.DELIMITER
        return torch.zeros(len(candidates), dtype=torch.long)

    def completed(self, candidate: Any) -> Candidate:
        ids = tuple(candidate.token_ids)
        return Candidate(ids, (-0.1,) * len(ids), f"Words number {ids[0]}.", candidate.finish)


def score(items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
    return [{"clip": float(uniforms((prompt.prompt_id, text), 1)[0])} for prompt, text in items]


def no_claims(items: Sequence[tuple[Prompt, str]]) -> list[dict[str, dict[str, float]]]:
    return [{} for _ in items]


def search(items: Sequence[Sequence[Prompt]], rows: int, *, stream: bool) -> tuple[list[Tree], list[int]]:
    """Search work items; return the trees of all prompts and the live rows of every step."""
    model: Any = NoModel()
    full_beam = METHOD.search.num_candidates * (METHOD.search.keep_top + METHOD.search.keep_bottom)
    max_prompts = max((PROMPTS_PER_FULL_BEAM if stream else 1) * rows // full_beam, 1)

    def begin(example: Prompt, score: Score, score_claims: ScoreClaims | None) -> tuple[Search, Proposer]:
        proposer = Scheduler(model, DrawnSampler(), max_rows=rows, max_prompts=max_prompts)
        settings = {"iteration": 1, "seed": 0, "scorer": "clip", "score_claims": score_claims}
        return Search(proposer, score, METHOD, **settings), proposer  # type: ignore[arg-type]

    ended: dict[int, OpenItem] = {}
    for group in [list(enumerate(items))] if stream else [[pair] for pair in enumerate(items)]:
        ended |= {opened.item: opened for opened in run(ItemStream(begin), iter(group))}
    return [tree for item in sorted(ended) for tree in ended[item].trees()], model.rows


def run(stream: ItemStream, items: Iterator[tuple[int, Sequence[Prompt]]]) -> Iterator[OpenItem]:
    """Search items as one stream; yield each as it ends."""
    while True:
        while stream.wants_item() and (pair := next(items, None)) is not None:
            stream.add(OpenItem(*pair, score, no_claims))
        if stream.is_idle:
            return
        yield from stream.step()


def measure(num_prompts: int, part: int, rows: int) -> dict[str, Any]:
    """Compare both ways on prompts in work items of ``part``."""
    prompts = [Prompt(f"p{index}", f"{index}.png", "?") for index in range(num_prompts)]
    items = [list(chunk) for chunk in batched(prompts, part)]
    result: dict[str, Any] = {"prompts": num_prompts, "prompts in an item": part, "rows at most": rows}
    trees = []
    for name, stream in (("item by item", False), ("as one stream", True)):
        found, live = search(items, rows, stream=stream)
        trees.append([(tree.prompt.prompt_id, tree.nodes) for tree in found])
        result[name] = {"steps": len(live), "mean live rows": round(sum(live) / len(live), 1)}
        result[name]["share"] = round(sum(live) / len(live) / rows, 3)
    assert trees[0] == trees[1], "a tree depends on what is searched with it"
    return result | {"target": TARGET, "missed": [] if result["as one stream"]["share"] >= TARGET else ["share"]}


def main() -> None:
    """Measure one setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--part", type=int, default=16, help="prompts in a work item")
    parser.add_argument("--rows", type=int, default=80, help="most rows decoded at once")
    arguments = parser.parse_args()
    result = measure(arguments.prompts, arguments.part, arguments.rows)
    print(json.dumps(result, indent=1))
    sys.exit(len(result["missed"]))


if __name__ == "__main__":
    main()
