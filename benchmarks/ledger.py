"""Measure speed and memory of writing, reading, pairing and reporting a ledger of millions of nodes.

    python benchmarks/ledger.py --rows 10000000 --out build/ledger [--json]

The nodes are synthetic but have the shape of a real search: per prompt, 16 partial responses of up
to five sentences with four candidates each, and sentences of 10 to 30 tokens that rarely repeat. With
``--claims N`` each sentence makes N claims of the 24 things that its prompt's responses mention, each with the
four cues of one scorer, and rewards are by claim.
Everything else is the package's own code: writers, readers, pairs, quality metrics, report. Each
step runs in a separate process, so that its peak memory can be measured. All prompts share one
small image file, so that the file system is not measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from memory import megabytes
from PIL import Image

from csr_vlm.config.load import resolve
from csr_vlm.core.progress import Silent, SilentProgress
from csr_vlm.core.records import (
    Finish,
    Node,
    NodeStatus,
    Prompt,
    nearest_column,
    negatives_column,
    spread_column,
)
from csr_vlm.pipeline import gates, stages
from csr_vlm.report.html import render
from csr_vlm.store import files, ledger, tables
from csr_vlm.store.run import Run

CANDIDATES, EXPANDED, DEPTH = 4, 4, 5
NODES_PER_PROMPT = CANDIDATES + (DEPTH - 1) * EXPANDED * CANDIDATES
VOCABULARY = 32_000
PACKED_BYTES = 64_000_000
NUM_THINGS = 24
"""Different things that the responses to a prompt mention."""
CUES = ("clip", negatives_column("clip"), spread_column("clip"), nearest_column("clip"))


def prompts(number: int, image: Path) -> Iterator[Prompt]:
    return (Prompt(f"prompt-{index:09d}", str(image), "Describe this image in detail.") for index in range(number))


def trees(group: list[Prompt], rng: np.random.Generator, num_claims: int = 0) -> Iterator[Node]:
    """Generate synthetic trees: four candidates for each of four kept nodes, to a depth of five."""
    words = [f"w{index:x}" for index in range(VOCABULARY)]
    for prompt in group:
        lengths = rng.integers(10, 31, NODES_PER_PROMPT)
        ids = np.minimum(rng.zipf(1.2, (NODES_PER_PROMPT, 30)), VOCABULARY - 1)
        logprobs = -rng.exponential(0.7, (NODES_PER_PROMPT, 30)).astype(np.float32)
        cosines = rng.normal(0.22, 0.04, (NODES_PER_PROMPT, 2)).astype(np.float32)
        known = claims_of(rng) if num_claims else {}
        made = np.minimum(rng.zipf(1.5, (NODES_PER_PROMPT, num_claims)), NUM_THINGS) - 1
        frontier, row = [""], 0
        for depth in range(1, DEPTH + 1):
            kept = []
            for parent in frontier:
                for sibling in range(CANDIDATES):
                    node_id = f"{parent}.{sibling}" if parent else str(sibling)
                    last = depth == DEPTH
                    expanded = not last and len(kept) < EXPANDED and (sibling == 0 or not parent)
                    kept += [node_id] if expanded else []
                    tokens = ids[row, : lengths[row]].tolist()
                    yield Node(
                        prompt_id=prompt.prompt_id,
                        iteration=1,
                        node_id=node_id,
                        parent_id=parent,
                        depth=depth,
                        token_ids=tuple(tokens),
                        token_logprobs=tuple(logprobs[row, : lengths[row]].tolist()),
                        text=f" {' '.join(words[token] for token in tokens)}.",
                        finish=Finish.EOS if last else Finish.DELIMITER,
                        status=NodeStatus.FINISHED if last else NodeStatus.TOP if expanded else NodeStatus.PRUNED,
                        cosines={"clip": float(cosines[row, 0]), "clip:others": float(cosines[row, 1])},
                        claims={f"thing-{thing}": known[thing] for thing in made[row].tolist()},
                    )
                    row += 1
            frontier = kept


def claims_of(rng: np.random.Generator) -> dict[int, dict[str, float]]:
    """Return the cues of the things of a prompt: two of three are in the picture."""
    cosines = rng.normal(0.2, 0.03, (NUM_THINGS, len(CUES))).astype(np.float32)
    cosines[: NUM_THINGS * 2 // 3, 0] += 0.15
    cosines[:, 2] = 0.03
    return {thing: dict(zip(CUES, row.tolist(), strict=True)) for thing, row in enumerate(cosines)}


def make_run(root: Path, num_prompts: int, num_claims: int) -> Run:
    layer = {
        **({"preset": "calibrated"} if num_claims else {}),
        "iterations": 1,
        "model": {"path": "none"},
        "scorer": {"path": "none"},
        "data": {"prompts": str(root.parent / "prompts")},
        "evaluation": {"heldout": 0},
        "method": {"pairs": {"questions": {"per_prompt": 0}}},  # claim questions would need a model
    }
    run = Run.create(root, resolve(layer))
    image = root.parent / "image.png"
    Image.new("RGB", (8, 8), "teal").save(image)
    tables.write_prompts(run.prompts_path, prompts(num_prompts, image), run.config.generation.prompts_per_part)
    digest = files.sha256_of(run.prompts_path)
    run.mark_done(0, "prompts", accepted=num_prompts, heldout=0, dropped={}, examples=[], sha256=digest)
    return run


def append(run: Run) -> dict[str, Any]:
    """Write every part; generating the nodes is not timed."""
    rng, rows, seconds = np.random.default_rng(0), 0, 0.0
    num_claims = int((run.root.parent / "claims").read_text())
    for index, group in enumerate(tables.prompt_groups(run.prompts_path)):
        nodes = list(trees(group, rng, num_claims))
        started = time.process_time()
        tables.write_nodes(run.iteration(1) / "ledger" / f"part-{index:06d}-0123456789abcdef.parquet", nodes)
        seconds += time.process_time() - started
        rows += len(nodes)
    run.mark_done(1, "generate", nodes=rows, statuses={}, seconds=round(seconds, 2))
    size = sum(part.stat().st_size for part in run.ledger_parts(1))
    return {"rows": rows, "seconds": seconds, "bytes a row": size / rows, "parts": len(run.ledger_parts(1))}


def resume(run: Run) -> dict[str, Any]:
    """Check which parts exist, as a resumed run does."""
    parts = {part.name for part in run.ledger_parts(1)}
    num_present = sum(f"part-{index:06d}-0123456789abcdef.parquet" in parts for index in range(len(parts)))
    assert num_present == tables.count_groups(run.prompts_path)
    return {}


def compact(run: Run) -> dict[str, Any]:
    ledger.pack(run, 1, PACKED_BYTES, SilentProgress())
    return {"files": len(run.ledger_parts(1))}


def read(run: Run) -> dict[str, Any]:
    return {"rows": sum(len(nodes) for nodes in ledger.trees(run, 1))}


def pair(run: Run) -> dict[str, Any]:
    stages.make_pairs(run, 1, Silent())
    return {"pairs": run.result(1, "pairs")["pairs"]}


def audit(run: Run) -> dict[str, Any]:
    gates.pair_metrics(run, 1, run.config)
    return {}


def report(run: Run) -> dict[str, Any]:
    return {"bytes": len(render(run))}


STEPS: dict[str, Callable[[Run], dict[str, Any]]] = {
    step.__name__: step for step in (append, resume, read, compact, pair, audit, report)
}


def _measure_here(name: str, root: Path, results: Any) -> None:
    """Run one step in this process and put its measurements into the queue."""
    run = Run.open(root)
    wall, started = time.perf_counter(), time.process_time()
    before = megabytes("VmHWM")
    result = STEPS[name](run)
    result.setdefault("seconds", time.process_time() - started)
    result |= {"wall": time.perf_counter() - wall, "peak, MB": megabytes("VmHWM")}
    results.put(result | {"imports, MB": before})


def measure(name: str, root: Path) -> dict[str, Any]:
    """Run one step in a separate process."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_measure_here, args=(name, root, results))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{name} failed")
    result: dict[str, Any] = results.get()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("build/ledger"))
    parser.add_argument("--claims", type=int, default=0, help="Claims of each sentence.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", action="store_true", help="Keep the ledger.")
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    (options.out / "claims").write_text(str(options.claims))
    make_run(options.out / "run", max(options.rows // NODES_PER_PROMPT, 1), options.claims)
    steps, rows = {}, 0
    for name in STEPS:
        steps[name] = measure(name, options.out / "run")
        rows = steps["append"]["rows"]
        steps[name]["rows/s"] = rows / max(steps[name]["seconds"], 1e-9)
    if not options.keep:
        shutil.rmtree(options.out)
    if options.json:
        print(json.dumps({"rows": rows, "steps": steps}, indent=1))
        return
    print(f"{rows:,} rows in {steps['append']['parts']:,} parts, {steps['append']['bytes a row']:.0f} bytes per row")
    print(f"{'step':8} {'rows/s':>12} {'CPU s':>9} {'wall s':>9} {'peak MB':>9} {'imports MB':>14}")
    for name, step in steps.items():
        figures = f"{step['rows/s']:12,.0f} {step['seconds']:9.1f} {step['wall']:9.1f} {step['peak, MB']:9.0f}"
        print(f"{name:8} {figures} {step['imports, MB']:14.0f}")


if __name__ == "__main__":
    main()
