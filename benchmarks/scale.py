"""Measure the overhead of distributed work per item, the size of a ledger, and the serial work per prompt.

    python benchmarks/scale.py items --items 400
    torchrun --nproc-per-node 2 benchmarks/scale.py items --items 400
    python benchmarks/scale.py items --items 400 --ray 2
    python benchmarks/scale.py ledger --prompts 1024
    python benchmarks/scale.py serial --prompts 512

``items`` distributes items that only write a file of 4 kB, in the way that ledger parts are
written. The difference between several processes and one is the overhead, in wall time and in
processor time of all processes (which other work on the machine does not affect). ``ledger`` writes
a part with the rows of a search with LLaVA-1.5: 85 nodes per prompt, sentences of 20 tokens.
``serial`` times the work that one process does for all, in processor time: checking an image of 640 x 480, without
and with the processor of the demo's LLaVA, and deriving a prompt's pairs.
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
from csr_vlm.config.schema import DataConfig, ModelConfig
from csr_vlm.core.progress import SilentProgress
from csr_vlm.core.records import Finish, Node, NodeStatus, Prompt
from csr_vlm.data.prompts import InputReport, read_prompts
from csr_vlm.method.pairs import make_pairs
from csr_vlm.models.loading import load_prompt_encoder
from csr_vlm.models.prompt_check import ProcessorCheck
from csr_vlm.scale import torchrun
from csr_vlm.scale.executor import ItemResult, Task
from csr_vlm.store import files, tables
from csr_vlm.world.demo import assets

WORDS = (
    "the a an of on in with and is are there image features large small red wooden table chair person standing near "
    "building street several other people can be seen background sitting dog car truck kitchen bowl filled fruit "
    "holding white black scene appears to adding atmosphere left right side positioned around."
).split()
SENTENCE_TOKENS = 20
VOCABULARY = 32_000


class FileWriter:
    """Write a file of 4 kB per item."""

    def __init__(self, root: Path, log: Callable[[str], None]) -> None:
        self._root = root

    def run_item(self, item: int) -> ItemResult:
        files.write_atomically(self._root / f"{item}.bin", lambda path: path.write_bytes(bytes(4096)) and None)
        return ItemResult(1, {})

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


@contextmanager
def timed(result: dict[str, Any]) -> Iterator[None]:
    wall, processor = time.perf_counter(), time.process_time()
    yield
    result["seconds"] = round(time.perf_counter() - wall, 3)
    result["processor seconds of this process"] = round(time.process_time() - processor, 3)


def time_items(number: int, actors: int | None) -> dict[str, Any]:
    """Distribute items with the executor that this process was started for."""
    worker_classes = (FileWriter,)
    result: dict[str, Any] = {"items": number, "processes": torchrun.num_launched(), "ray actors": actors}
    with TemporaryDirectory() as folder:
        task = Task(FileWriter, Path(folder), {}, number)
        executor = torchrun.torchrun_executor(worker_classes) if torchrun.num_launched() > 1 else executor_for(actors)
        with executor as workers:
            workers.map(Task(FileWriter, Path(folder), {}, 8), SilentProgress(), print)  # warm up
            with timed(result):
                workers.map(task, SilentProgress(), print)
        assert len(list(Path(folder).glob("*.bin"))) == number
    result["milliseconds an item"] = round(1000 * result["seconds"] / number, 3)
    return result


def make_nodes(prompt: str, random: np.random.Generator) -> list[Node]:
    """Generate a tree of depth 5: 5 candidates, then 4 x 5 per round, with token ids of a Zipf distribution."""
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
    """Write one part and measure its size."""
    random = np.random.default_rng(0)
    nodes = [node for index in range(num_prompts) for node in make_nodes(f"coco-{index:09d}", random)]
    result: dict[str, Any] = {"prompts": num_prompts, "nodes": len(nodes)}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "part.parquet"
        with timed(result):
            tables.write_nodes(path, nodes)
        result["bytes a node"] = round(path.stat().st_size / len(nodes), 1)
    result["bytes a prompt"] = round(result["bytes a node"] * len(nodes) / num_prompts)
    return result


def measure_serial(num_prompts: int) -> dict[str, Any]:
    """Time the work that one process does for all prompts."""
    random = np.random.default_rng(0)
    result: dict[str, Any] = {"prompts": num_prompts}
    with TemporaryDirectory() as folder:
        root = Path(folder)
        noise = random.integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((640, 480)).save(root / "picture.jpg", quality=90)
        rows = [
            {"prompt_id": f"p{index}", "image": "picture.jpg", "text": "What is there?"} for index in range(num_prompts)
        ]
        (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
        encoder = load_prompt_encoder(ModelConfig(path=str(assets() / "llava"), device="cpu"))
        for name, model in (("check", None), ("check with the processor", ProcessorCheck(encoder))):
            started = time.process_time()
            data = DataConfig(prompts=str(root / "prompts.jsonl"))
            accepted = len(list(read_prompts(data, InputReport(), model=model)))
            result[f"{name}, ms a prompt"] = round(1000 * (time.process_time() - started) / accepted, 2)
    config = resolve({"model": {"path": "m"}, "scorer": {"path": "s"}, "data": {"prompts": "p"}}).method
    trees = [make_nodes(f"p{index}", random) for index in range(num_prompts)]
    started = time.process_time()
    for nodes in trees:
        make_pairs(Prompt(nodes[0].prompt_id, "picture.jpg", "What?"), nodes, config, "clip", 0)
    result["pairs, ms a prompt"] = round(1000 * (time.process_time() - started) / num_prompts, 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("items", "ledger", "serial"))
    parser.add_argument("--items", type=int, default=400)
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--ray", type=int, default=None)
    options = parser.parse_args()
    if options.what == "items":
        result = time_items(options.items, options.ray)
    else:
        result = {"ledger": measure_ledger, "serial": measure_serial}[options.what](options.prompts)
    if result:
        times = os.times()
        result["processor seconds in total"] = round(sum(times[:4]), 2)
        print(json.dumps(result))


if __name__ == "__main__":
    main()
