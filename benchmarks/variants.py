"""Compare settings on the embedded world: whole runs, or one iteration from one shared ledger.

    python benchmarks/variants.py calibrated only_ri random_pairs --out build/variants --seeds 0 1 2
    python benchmarks/variants.py calibrated "half: method.lambda=0.5" --out build/once --one-iteration

A variant is a preset's name, or ``label: key=value key=value`` on top of the default
preset. Scenes are of the development split unless ``--test`` is given: settings are chosen
on the former and claimed on the latter. Prints one row a run and writes them all to
``OUT/results.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from csr_vlm.cli.console import quiet_libraries
from csr_vlm.config import RunConfig, load_config, merged, presets
from csr_vlm.errors import CsrError
from csr_vlm.store.run import Run

METRICS = ("chair_s", "chair_i", "recall", "companion_recall", "attributes_right", "repeats", "words", "relevance")
QUESTIONS = ("yes_no_present", "yes_no_absent", "yes_no_companion")


def parse_variant(text: str) -> tuple[str, list[str]]:
    """Split ``label: key=value ...`` or a preset's name into a label and overrides."""
    label, separator, overrides = text.partition(":")
    if separator:
        return label.strip(), overrides.split()
    if label not in presets():
        raise CsrError(f"{label!r} is neither a preset nor 'label: key=value ...'", f"presets: {', '.join(presets())}")
    return label, [f"preset={label}"]


def evaluate(config: RunConfig, adapter: Path | None, split: str, scenes: int, temperature: float) -> dict[str, Any]:
    """Measure base plus adapter on fresh scenes."""
    from csr_vlm import stages
    from csr_vlm.progress import Silent

    world = {"num_scenes": scenes, "seed": 5, "split": split}
    measuring = load_config(None, base=merged(config.dump(), {"evaluation": {"world": world}}))
    found = stages.evaluate_world(measuring, adapter, "", Silent(), temperature)
    return {name: metric["value"] for name, metric in found["metrics"].items()}


def whole_run(root: Path, config: RunConfig, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all iterations and measure each."""
    from csr_vlm import stages
    from csr_vlm.progress import Silent

    run = Run.create(root, config)
    rows = []
    stages.check_inputs(run, Silent())
    for iteration in range(config.iterations + 1):
        started = time.perf_counter()
        if iteration:
            stages.generate(run, iteration, Silent())
            stages.make_pairs(run, iteration, Silent())
            stages.train(run, iteration, Silent())
        seconds = time.perf_counter() - started
        measured = evaluate(
            config, run.adapter_path(iteration), arguments.split, arguments.scenes, arguments.temperature
        )
        made = {k: v for k, v in run.result(iteration, "pairs").items() if k != "prompts_without"} if iteration else {}
        rows.append({"iteration": iteration, "seconds": round(seconds, 1), "metrics": measured, "pairs": made})
    return rows


def one_iteration(root: Path, config: RunConfig, source: Run, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Train once on pairs that the settings derive from another run's first ledger."""
    from csr_vlm import stages
    from csr_vlm.training.dpo import train

    pairs, _ = stages.derive_pairs(source, 1, config)
    adapter = root / "adapter"
    root.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    train(pairs, config.model, config.training, previous=None, adapter=adapter, work=root / "work", seed=config.seed)
    seconds = time.perf_counter() - started
    measured = evaluate(config, adapter, arguments.split, arguments.scenes, arguments.temperature)
    summary = stages.summarise_pairs(pairs)
    return [{"iteration": 1, "seconds": round(seconds, 1), "metrics": measured, "pairs": summary}]


def main() -> None:
    """Run the variants that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", help="presets, or 'label: key=value ...'")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--one-iteration", action="store_true", help="train each once, from one shared ledger")
    parser.add_argument("--test", dest="split", action="store_const", const="test", default="development")
    arguments = parser.parse_args()
    quiet_libraries()
    from csr_vlm import stages
    from csr_vlm.progress import Silent
    from csr_vlm.world.demo import demo_config

    log = arguments.out / "results.jsonl"
    for seed in arguments.seeds:
        base = demo_config(arguments.out, seed, arguments.prompts, arguments.scenes).dump()
        own = {key: base[key] for key in ("seed", "model", "scorer", "data")} | {"iterations": arguments.iterations}
        source = Run.create(arguments.out / f"ledger-{seed}", load_config(None, base=own))
        if arguments.one_iteration:
            stages.check_inputs(source, Silent())
            stages.generate(source, 1, Silent())
        for text in arguments.variants:
            label, overrides = parse_variant(text)
            config = load_config(None, overrides, base=own)
            root = arguments.out / f"{label.replace(' ', '-')}-{seed}"
            if arguments.one_iteration:
                rows = one_iteration(root, config, source, arguments)
            else:
                rows = whole_run(root, config, arguments)
            for row in rows:
                record = {"variant": label, "overrides": overrides, "seed": seed, "split": arguments.split, **row}
                with log.open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps(record) + "\n")
                print_row(record)


def print_row(record: dict[str, Any]) -> None:
    """Print one line a person can read."""
    metrics = record["metrics"]
    shown = [f"{metrics[name]:.3f}" for name in METRICS] + ["/".join(f"{metrics[name]:.2f}" for name in QUESTIONS)]
    pairs = record["pairs"]
    lengths = f"{pairs['chosen_sentences']:.2f}>{pairs['rejected_sentences']:.2f}" if pairs else ""
    head = f"{record['variant']:<24} seed {record['seed']} iteration {record['iteration']}"
    print(head, *shown, lengths, f"{record['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
