"""Print what training 13,000 prompts costs on several GPUs, for docs/scaling.md.

    python benchmarks/training_cost.py

Shapes are those of the published configurations; the share of a GPU's peak that training reaches is an
assumption (``--utilization``).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from csr_vlm.pipeline.training_cost import TrainedModel, TreeShape


@dataclass(frozen=True)
class Gpu:
    """Hold a GPU's dense bfloat16 peak in operations per second, and its memory in bytes."""

    name: str
    peak: float
    memory: float


GPUS = (
    Gpu("A100-80", 312e12, 80e9),
    Gpu("H100", 989e12, 80e9),
    Gpu("H200", 989e12, 141e9),
    Gpu("4090-24", 165e12, 24e9),
)
MODELS = {
    # CLIP ViT-L/14 at 336 pixels: 576 image tokens, and about 44 of text.
    "LLaVA-1.5-7B": (TrainedModel(6.48e9, 7.06e9, 32, 4096, 32_064, 0.30e9, 577), 620),
    # 640 x 480 pixels: 23 x 17 merged patches, and about 49 tokens of text.
    "Qwen2.5-VL-7B": (TrainedModel(6.53e9, 8.29e9, 28, 3584, 152_064, 0.68e9, 1564), 440),
}
PROMPTS, EPOCHS = 13_000, 2
PAIRS, QUESTIONS, SENTENCE, PATH = 12, 4, 20, 60
NF4 = 0.6
"""Bytes of a 4-bit weight, with its share of scales and of what stays in bfloat16."""


def main() -> None:
    """Print one line per model and GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utilization", type=float, default=0.4, help="assumed share of the peak")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA")
    parser.add_argument("--max-tokens", type=int, default=8192, help="training.max_tokens")
    arguments = parser.parse_args()
    for name, (model, prompt) in MODELS.items():
        tree = TreeShape(prompt, PATH, PAIRS, SENTENCE, QUESTIONS)
        lora = 19 * arguments.rank * model.width * model.layers
        operations = PROMPTS * EPOCHS * model.tree_operations(tree.tokens, tree.targets, lora)
        rows = 2 * (PAIRS + QUESTIONS)
        separate = PROMPTS * EPOCHS * rows * model.tree_operations(tree.separate_tokens // rows, SENTENCE, lora)
        print(
            f"{name}: {tree.tokens} tokens a tree ({tree.separate_tokens} in rows of their own), "
            f"{operations:.2e} operations ({separate:.2e})"
        )
        for gpu in GPUS:
            bytes_per_weight = 2.0 if gpu.memory > 40e9 else NF4
            memory = model.memory_bytes(arguments.max_tokens, lora, bytes_per_weight)
            hours = operations / (gpu.peak * arguments.utilization) / 3600
            fits = "" if memory < gpu.memory else "  does not fit: lower training.max_tokens"
            print(f"  {gpu.name:<8} {hours:6.2f} h  {memory / 1e9:5.1f} GB{' (nf4)' * (bytes_per_weight < 2)}{fits}")


if __name__ == "__main__":
    main()
