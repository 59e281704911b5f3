"""What it costs to share work: the price of an item, and the size of a ledger.

    python benchmarks/scale.py items --items 400
    torchrun --nproc-per-node 2 benchmarks/scale.py items --items 400
    python benchmarks/scale.py items --items 400 --ray 2
    python benchmarks/scale.py ledger --prompts 1024
    python benchmarks/scale.py serial --prompts 512

``items`` spreads items that do nothing but write a file of 4 kB as ledger parts are written.
What a crew takes for them beyond what one process takes is its price, in seconds of
processor time of all processes (which other work on the machine does not change) and of the
clock. ``ledger`` writes a part with the rows that a search with LLaVA-1.5 leaves: 85 nodes a
prompt, sentences of 20 tokens. ``serial`` times what one process does for all: checking a
picture of 640 x 480, deriving a prompt's pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from csr_vlm.cli.executors import executor_for
from csr_vlm.config.load import resolve
from csr_vlm.config.schema import DataConfig
from csr_vlm.core.progress import SilentProgress
from csr_vlm.core.records import Finish, Node, NodeStatus, Prompt
from csr_vlm.data.prompts import InputReport, read_prompts
from csr_vlm.method.pairs import make_pairs
from csr_vlm.scale import torchrun
from csr_vlm.scale.executor import ItemResult, Task
from csr_vlm.store import files, tables

WORDS = (
    "the a an of on in with and is are there image features large small red wooden table chair person standing near "
    "building street several other people can be seen background sitting dog car truck kitchen bowl filled fruit "
    "holding white black scene appears to adding atmosphere left right side positioned around."
).split()
SENTENCE_TOKENS = 20
VOCABULARY = 32_000


class Writes:
    """An item writes 4 kB."""

    def __init__(self, root: Path, log: Callable[[str], None]) -> None:
        self._root = root

    def run_item(self, item: int) -> ItemResult:
        files.write_atomically(self._root / f"{item}.bin", lambda path: path.write_bytes(bytes(4096)) and None)
        return ItemResult(1, {})


@contextmanager
def timed(found: dict[str, Any]) -> Iterator[None]:
    wall, processor = time.perf_counter(), time.process_time()
    yield
    found["seconds"] = round(time.perf_counter() - wall, 3)
    found["processor seconds of this process"] = round(time.process_time() - processor, 3)


def time_items(number: int, actors: int | None) -> dict[str, Any]:
    """Spread items over whatever crew this was started with."""
    ranks_makers = (Writes,)
    found: dict[str, Any] = {"items": number, "processes": torchrun.num_launched(), "ray actors": actors}
    with TemporaryDirectory() as folder:
        task = Task(Writes, Path(folder), {}, number)
        executor = torchrun.torchrun_executor(ranks_makers) if torchrun.num_launched() > 1 else executor_for(actors)
        with executor as one:
            one.map(Task(Writes, Path(folder), {}, 8), SilentProgress(), print)  # whatever is slow once
            with timed(found):
                one.map(task, SilentProgress(), print)
        assert len(list(Path(folder).glob("*.bin"))) == number
    found["milliseconds an item"] = round(1000 * found["seconds"] / number, 3)
    return found


def make_nodes(prompt: str, random: np.random.Generator) -> list[Node]:
    """A tree of five sentences' depth: 5 candidates, then 4 x 5 a round; ids as frequent as in language."""
    nodes = []
    parents = [("", 0)]
    for depth in range(1, 6):
        children = [(f"{parent}.{i}".lstrip("."), parent) for parent, _ in parents for i in range(5)]
        for node_id, parent_id in children:
            ids = np.minimum(random.zipf(1.3, SENTENCE_TOKENS), VOCABULARY - 1)
            logprobs = np.log(random.beta(2, 0.5, SENTENCE_TOKENS)).astype(np.float32)
            text = " ".join(random.choice(WORDS, 15))
            cosines = {"clip": float(random.normal(0.25, 0.04)), "clip:others": float(random.normal(0.15, 0.02))}
            nodes.append(
                Node(
                    prompt_id=prompt,
                    iteration=1,
                    node_id=node_id,
                    parent_id=parent_id,
                    depth=depth,
                    token_ids=tuple(map(int, ids)),
                    token_logprobs=tuple(map(float, logprobs)),
                    text=text,
                    finish=Finish.EOS if depth == 5 else Finish.DELIMITER,
                    status=NodeStatus.FINISHED if depth == 5 else NodeStatus.TOP,
                    cosines=cosines,
                )
            )
        parents = [(node_id, depth) for node_id, _ in children][:4]
    return nodes


def measure_ledger(num_prompts: int) -> dict[str, Any]:
    """Write one part and look at its size."""
    random = np.random.default_rng(0)
    nodes = [node for at in range(num_prompts) for node in make_nodes(f"coco-{at:09d}", random)]
    found: dict[str, Any] = {"prompts": num_prompts, "nodes": len(nodes)}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "part.parquet"
        with timed(found):
            tables.write_nodes(path, nodes)
        found["bytes a node"] = round(path.stat().st_size / len(nodes), 1)
    found["bytes a prompt"] = round(found["bytes a node"] * len(nodes) / num_prompts)
    return found


def measure_serial(num_prompts: int) -> dict[str, Any]:
    """Time what is done by one process for all prompts."""
    random = np.random.default_rng(0)
    found: dict[str, Any] = {"prompts": num_prompts}
    with TemporaryDirectory() as folder:
        root = Path(folder)
        noise = random.integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((640, 480)).save(root / "picture.jpg", quality=90)
        rows = [{"prompt_id": f"p{at}", "image": "picture.jpg", "text": "What is there?"} for at in range(num_prompts)]
        (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
        started = time.process_time()
        accepted = len(list(read_prompts(DataConfig(prompts=str(root / "prompts.jsonl")), InputReport())))
        found["check, ms a prompt"] = round(1000 * (time.process_time() - started) / accepted, 2)
    config = resolve({"model": {"path": "m"}, "scorer": {"path": "s"}, "data": {"prompts": "p"}}).method
    trees = [make_nodes(f"p{at}", random) for at in range(num_prompts)]
    started = time.process_time()
    for nodes in trees:
        make_pairs(Prompt(nodes[0].prompt_id, "picture.jpg", "What?"), nodes, config, "clip", 0)
    found["pairs, ms a prompt"] = round(1000 * (time.process_time() - started) / num_prompts, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("items", "ledger", "serial"))
    parser.add_argument("--items", type=int, default=400)
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--ray", type=int, default=None)
    options = parser.parse_args()
    if options.what == "items":
        found = time_items(options.items, options.ray)
    else:
        found = {"ledger": measure_ledger, "serial": measure_serial}[options.what](options.prompts)
    if found:
        times = os.times()
        found["processor seconds of it all"] = round(sum(times[:4]), 2)
        print(json.dumps(found))


if __name__ == "__main__":
    main()
