"""Compare a DPO step with stock TRL's: shared prefixes computed once, reference logprobs from the ledger.

    python benchmarks/dpo.py --sizes tiny mid --dtypes float32 bfloat16 --out build/dpo.json

A step consists of collating the batch, the loss and its gradients. ``stock`` is trl.DPOTrainer
with four passes through the language model (chosen and rejected, under policy and reference), each
of which encodes the image again. ``ours`` is the trainer of this package with the reference
logprobs from the ledger. Both train the same adapter on the same weights and pairs. They are timed
alternately, so that other load on the machine affects both; medians and the median ratio are
reported. Loss and gradients are compared before anything is timed; in float32 the benchmark fails
if they differ by more than rounding errors.

``tiny`` is the embedded world's model, with 36 image tokens. ``mid`` has random weights, a language
model of 162M parameters and 576 image tokens. ``--shared`` is the share of a response that chosen
and rejected have in common as a prefix: 0 for two different responses, close to 1 for siblings late
in a response.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from csr_vlm.training.packing import disable_vision_gradients
from datasets import Dataset
from memory import megabytes
from models import SIZES, make_policy
from trl import DPOTrainer

from csr_vlm.cli.console import quiet_libraries
from csr_vlm.config.schema import ModelConfig, TrainingConfig
from csr_vlm.core.records import Pair, Prompt, Response
from csr_vlm.models.policy import Policy
from csr_vlm.store.files import write_json
from csr_vlm.store.run import versions
from csr_vlm.training.collator import PairCollator, training_row
from csr_vlm.training.dpo import CsrTrainer, trainable_policy, trainer_arguments
from csr_vlm.world.dataset import write_images
from csr_vlm.world.demo import assets
from csr_vlm.world.scenes import HARBOUR, Split, make_scenes

TRAINING = TrainingConfig.model_validate({"lora": {"r": 16, "alpha": 32}})
TOKENS = {"tiny": 40, "mid": 100}
"""Number of tokens per response."""
TARGETS = {"tiny": 2.0, "mid": 2.3}
"""Target speedup over stock TRL."""
LARGEST_DIFFERENCE = 1e-4
"""Largest accepted difference in float32, of the loss relative to itself and of the gradients relative to the
largest one. The reference logprobs come from batches of different shapes, so they differ by rounding."""


@dataclass
class Side:
    """Hold a trainer, its collator and its rows."""

    trainer: Any
    collator: PairCollator
    rows: list[dict[str, Any]]

    def step(self) -> float:
        self.trainer.model.zero_grad()
        batch = self.trainer._prepare_inputs(self.collator(self.rows))
        loss = self.trainer.compute_loss(self.trainer.model, batch)
        loss.backward()
        return float(loss.detach())

    def gradients(self) -> dict[str, torch.Tensor]:
        return {n: p.grad.float().clone() for n, p in self.trainer.model.named_parameters() if p.grad is not None}


def make_mid(directory: Path) -> None:
    """Write a checkpoint of the size ``mid``."""
    policy = make_policy(SIZES["mid"], torch.float32)
    policy.model.save_pretrained(directory)
    policy.processor.save_pretrained(directory)


def make_pairs(policy: Policy, prompts: list[Prompt], length: int, shared: float) -> list[Pair]:
    """Generate random pairs with a common prefix, and their logprobs under the policy."""
    generator = torch.Generator().manual_seed(0)
    words = [token for token in range(5, len(policy.tokenizer)) if token not in policy.image_token_ids]
    prefix_length = int(shared * length)
    pairs = []
    for prompt in prompts:
        drawn = [words[i] for i in torch.randint(len(words), (2 * length,), generator=generator).tolist()]
        # The rejected response is slightly shorter, so that a mix-up of lengths cannot go unnoticed.
        ids = [
            tuple(drawn[:length]),
            tuple(drawn[:prefix_length] + drawn[length : 2 * length - prefix_length - length // 10]),
        ]
        logprobs = [float(lp.sum()) for lp in policy.teacher_forced([prompt, prompt], ids)]
        sides = [Response("1", i, lp, "", 1, 0.0, complete=True) for i, lp in zip(ids, logprobs, strict=True)]
        pairs.append(Pair(prompt=prompt, iteration=1, chosen=sides[0], rejected=sides[1]))
    return pairs


def make_side(kind: type, policy: Policy, pairs: list[Pair], work: Path, checkpointing: bool) -> Side:
    """Create a trainer for a policy, and move the policy slightly away from its reference."""
    ours = kind is CsrTrainer
    rows = [training_row(pair) for pair in pairs]
    if ours:
        disable_vision_gradients(policy.base_model)
    settings = {"per_device_train_batch_size": len(pairs), "gradient_checkpointing": checkpointing}
    training = TRAINING.model_copy(update={"trl": settings})
    trainer = kind(
        model=policy.model,
        args=trainer_arguments(training, work, 0, policy.device.type),
        train_dataset=Dataset.from_list(rows),
        data_collator=PairCollator(policy, packing=ours),
        processing_class=policy.processor,
    )
    trainer.precompute_ref_logps = ours
    trainer.first_loss = 0.0
    if checkpointing:
        policy.base_model.gradient_checkpointing_enable()
    trainer.model.train()
    noise = torch.Generator().manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B.default" in name:
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=noise).to(parameter)
    return Side(trainer, trainer.data_collator, rows)


def differences(ours: Side, stock: Side) -> dict[str, float]:
    """Compare one step: loss relative to itself, gradients relative to the largest one."""
    losses = [side.step() for side in (ours, stock)]
    actual, expected = ours.gradients(), stock.gradients()
    if actual.keys() != expected.keys():
        raise RuntimeError("the two trainers train different parameters")
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    difference = max(float((actual[name] - gradient).abs().max()) for name, gradient in expected.items())
    return {"loss": abs(losses[0] - losses[1]) / abs(losses[1]), "gradients": difference / largest}


def peak_megabytes(step: Callable[[], float]) -> float:
    """Run a step and return the peak increase of memory in MB, of the GPU if there is one."""
    gc.collect()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = megabytes("VmRSS")
    step()
    return megabytes("VmHWM") - before


def seconds(step: Callable[[], float]) -> float:
    """Time a step in seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(checkpoint: Path, size: str, dtype: str, shared: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Verify and time one model in one precision."""
    with TemporaryDirectory() as work:
        scenes = list(make_scenes(HARBOUR, Split.DEVELOPMENT, 0, arguments.pairs))
        prompts = write_images(scenes, Path(work))
        config = ModelConfig(path=str(checkpoint), dtype=dtype)
        torch.manual_seed(0)
        first = trainable_policy(config, TRAINING, None)
        pairs = make_pairs(first, prompts, arguments.tokens or TOKENS[size], shared)
        ours = make_side(CsrTrainer, first, pairs, Path(work), arguments.gradient_checkpointing)
        torch.manual_seed(0)
        second = trainable_policy(config, TRAINING, None)
        stock = make_side(DPOTrainer, second, pairs, Path(work), arguments.gradient_checkpointing)
        difference = differences(ours, stock)
        turns = [(seconds(stock.step), seconds(ours.step)) for _ in range(arguments.repeats)]
        memory = {"stock": peak_megabytes(stock.step), "ours": peak_megabytes(ours.step)}
    ratio = statistics.median(stock / ours for stock, ours in turns)
    return {
        "size": size,
        "dtype": dtype,
        "shared": shared,
        "pairs": arguments.pairs,
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "seconds": {
            "stock": statistics.median(turn[0] for turn in turns),
            "ours": statistics.median(turn[1] for turn in turns),
        },
        "ratio": ratio,
        "target": TARGETS[size],
        "missed": ratio < TARGETS[size],
        "turns": turns,
        "peak_megabytes": memory,
        "difference": difference,
    }


def print_row(row: dict[str, Any]) -> None:
    """Print a row as one line of text."""
    timing, memory, difference = row["seconds"], row["peak_megabytes"], row["difference"]
    print(
        f"{row['size']:<5} {row['dtype']:<9} shared {row['shared']:.1f}  stock {timing['stock']:8.3f} s  "
        f"ours {timing['ours']:8.3f} s  ratio {row['ratio']:5.2f}  "
        f"peak {memory['stock']:7.0f} > {memory['ours']:7.0f} MB  "
        f"loss {difference['loss']:.1e}  gradients {difference['gradients']:.1e}"
        + (f"  MISSED: target {row['target']}" if row["missed"] else ""),
        flush=True,
    )


def main() -> None:
    """Run the selected comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=sorted(TOKENS), default=["tiny"])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--shared", nargs="+", type=float, default=[0.0, 0.5])
    parser.add_argument("--pairs", type=int, default=4, help="pairs per batch")
    parser.add_argument("--tokens", type=int, help="tokens per response; 40 for tiny and 100 for mid by default")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    quiet_libraries()
    rows = []
    with TemporaryDirectory() as directory:
        for size in arguments.sizes:
            checkpoint = assets() / "llava" if size == "tiny" else Path(directory)
            if size == "mid":
                make_mid(checkpoint)
            for dtype in arguments.dtypes:
                for shared in arguments.shared:
                    rows.append(compare(checkpoint, size, dtype, shared, arguments))
                    print_row(rows[-1])
    if arguments.out is not None:
        write_json(arguments.out, {"versions": versions(), "threads": torch.get_num_threads(), "rows": rows})
    failed = [row for row in rows if row["dtype"] == "float32" and max(row["difference"].values()) > LARGEST_DIFFERENCE]
    if failed:
        raise SystemExit(f"loss or gradients differ: {failed[0]['size']}, {failed[0]['difference']}")


if __name__ == "__main__":
    main()
