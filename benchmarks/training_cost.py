"""Print the operations, bytes and hours of training 13,000 prompts on several GPUs, for docs/scaling.md.

    python benchmarks/training_cost.py

Shapes come from the table of published models, rates from the GPUs' data sheets; the share of the peak that training
reaches is an assumption (``--utilization``).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from csr_vlm.models.architecture import Architecture, published_architecture
from csr_vlm.pipeline.hardware import GPUS
from csr_vlm.pipeline.training_cost import TrainedModel, TreeShape

MODELS = {"LLaVA-1.5-7B": "llava-hf/llava-1.5-7b-hf", "Qwen2.5-VL-7B": "Qwen/Qwen2.5-VL-7B-Instruct"}
TEXT_TOKENS = 45
"""Tokens of a chat template and a question."""
PROMPTS, SENTENCE, PATH = 13_000, 20, 60


@dataclass(frozen=True)
class Row:
    """Hold the costs of one model."""

    tokens: int
    separate_tokens: int
    operations: float
    separate_operations: float


def trained(shape: Architecture) -> TrainedModel:
    """Return the dimensions that the costs of training follow from."""
    return TrainedModel(
        shape.layer_parameters, shape.parameters, shape.layers, shape.heads * shape.head_width, shape.vocabulary,
        shape.vision_parameters, shape.vision_tokens,
    )  # fmt: skip


def costs(shape: Architecture, pairs: int, questions: int, epochs: int, rank: int) -> Row:
    """Return the costs of one iteration in trees, and in a row for each response."""
    model, lora = trained(shape), shape.lora_parameters(rank)
    tree = TreeShape(shape.image_tokens + TEXT_TOKENS, PATH, pairs, SENTENCE, questions)
    rows = 2 * (pairs + questions)
    separate = model.tree_operations(tree.separate_tokens // rows, SENTENCE, lora) * rows
    trees = PROMPTS * epochs
    together = trees * model.tree_operations(tree.tokens, tree.targets, lora)
    return Row(tree.tokens, tree.separate_tokens, together, trees * separate)


def main() -> None:
    """Print one line per model and GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utilization", type=float, default=0.35, help="assumed share of the peak")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of a prompt")
    parser.add_argument("--questions", type=int, default=4, help="claim questions of a prompt")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rank", type=int, default=128, help="rank of the LoRA")
    parser.add_argument("--max-tokens", type=int, default=8192, help="training.max_tokens")
    arguments = parser.parse_args()
    for name, path in MODELS.items():
        shape = published_architecture(path)
        assert shape is not None
        row = costs(shape, arguments.pairs, arguments.questions, arguments.epochs, arguments.rank)
        print(
            f"{name}: {row.tokens} tokens a tree ({row.separate_tokens} in rows of their own), "
            f"{row.operations:.2e} operations ({row.separate_operations:.2e})"
        )
        for gpu in GPUS.values():
            nf4 = gpu.memory < 40e9
            weights = shape.weight_bytes(2.0, nf4=nf4)
            adapter = 16 * shape.lora_parameters(arguments.rank)
            beside = trained(shape).memory_bytes(arguments.max_tokens, shape.lora_parameters(arguments.rank), 0.0)
            hours = row.operations / (gpu.flops * arguments.utilization) / 3600
            print(
                f"  {gpu.name:<10} {hours:6.2f} h  {(weights + beside) / 1e9:5.1f} GB: weights {weights / 1e9:.1f}"
                f"{' (nf4)' * nf4}, adapter and optimizer {adapter / 1e9:.1f}, "
                f"activations {(beside - adapter) / 1e9:.1f}"
            )


if __name__ == "__main__":
    main()
