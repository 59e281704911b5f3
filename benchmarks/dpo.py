"""Compare a DPO step on prefix trees with stock TRL and with one row per pair.

    python benchmarks/dpo.py --sizes tiny mid --pairs 2 4 12 --questions 0 4 --out build/dpo.json
    python benchmarks/dpo.py --count RUN
    python benchmarks/dpo.py --train RUN --repeats 3

A step consists of collating the pairs of one prompt (siblings) and its claim questions, the loss and
its gradients. ``stock`` is trl.DPOTrainer: one row per response, policy and reference, with the image
in every row; ``--stock-pairs`` divides its step into batches that fit the memory, whose gradients add up
(``gradient_accumulation_steps``), as ``--max-tokens`` divides the steps of the other two. ``pair rows``
shares tokens within a pair only, as version 0.1 did; ``trees`` is this package. Both have the reference
log-probabilities from the ledger. All train the same adapter on the same weights and pairs. They are timed
alternately, so that other load on the machine affects all; medians and the medians of the ratios are reported.
With ``--stock-repeats`` stock is timed in fewer turns, or with 0 in its first step alone, which the others do
not count; with ``--without-stock`` trees are compared with pair rows alone. Loss and gradients are compared
before anything is timed; in float32 the benchmark fails if they differ by more than rounding errors.

``tiny`` is the embedded world's model, with 36 image tokens. ``mid`` has random weights, a language
model of 162M parameters and 576 image tokens. Siblings share a prefix of sentences and differ in one:
pair number i begins with i mod 4 common sentences, and its two sides end with one of their own.

``--count`` counts the tokens of an epoch of a run's first training instead: those that the model computes,
padding included, those that are distinct, and those of one row per response. ``--train`` trains a run's first
iteration again, in trees and in pair rows alternately, and reports CPU seconds of the whole stage (loading the
model, checking the reference, training, writing the adapter), with images prepared in the same process.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch
from memory import megabytes
from models import SIZES, make_policy
from stock import stock_batch, stock_trainer

from csr_vlm.cli.console import quiet_libraries
from csr_vlm.config.schema import ModelConfig, TrainingConfig
from csr_vlm.core.batching import batched
from csr_vlm.core.records import Pair, Prompt, Response
from csr_vlm.models.loading import load_policy
from csr_vlm.models.passes import Block
from csr_vlm.models.policy import Policy
from csr_vlm.store import tables
from csr_vlm.store.files import write_json
from csr_vlm.store.run import Run, versions
from csr_vlm.store.tables import PairFiles
from csr_vlm.training import dpo
from csr_vlm.training.collator import PairCollator
from csr_vlm.training.distribution import pairs_per_step
from csr_vlm.training.dpo import trainable_policy, trainer_arguments
from csr_vlm.training.steps import StepDataset, StepPlan
from csr_vlm.training.trainer import CsrTrainer
from csr_vlm.training.tree_rows import disable_vision_gradients
from csr_vlm.world.dataset import write_images
from csr_vlm.world.demo import assets
from csr_vlm.world.scenes import HARBOUR, Split, make_scenes

TRAINING = TrainingConfig.model_validate({"lora": {"r": 16, "alpha": 32}})
SENTENCE = {"tiny": 8, "mid": 20}
"""Number of tokens of a sentence."""
LARGEST_DIFFERENCE = 1e-4
"""Largest accepted difference in float32, of the loss relative to itself and of the gradients relative to the
largest one. The reference logprobs come from batches of different shapes, so they differ by rounding."""
KINDS = ("stock", "pair rows", "trees")


class PairRows(PairCollator):
    """Share tokens within a pair only."""

    def blocks(self, pairs: Sequence[Pair]) -> list[Block]:
        """Arrange each pair by itself."""
        alone = [(number, super(PairRows, self).blocks([pair])) for number, pair in enumerate(pairs)]
        return [replace(block, units=(number,)) for number, (block,) in alone]


@dataclass
class Side:
    """Hold a trainer, and what builds its passes."""

    trainer: Any
    passes: Callable[[], list[dict[str, Any]]]

    def step(self) -> float:
        """Compute the loss and the gradients of a step."""
        self.trainer.model.zero_grad()
        total = 0.0
        batches = self.passes()
        num_pairs = sum(len(batch["ref_chosen_logps"]) for batch in batches)
        for batch in batches:
            weight = len(batch["ref_chosen_logps"]) / num_pairs
            self.trainer._weight = 1.0
            loss = weight * self.trainer.compute_loss(self.trainer.model, self.trainer._prepare_inputs(batch))
            loss.backward()
            total += float(loss.detach())
        return total

    def tokens(self) -> int:
        """Count the tokens of a step that the language model computes in one pass over each, without padding."""
        return sum(int(batch["attention_mask"].sum()) for batch in self.passes())

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradients of the policy's adapter."""
        named = self.trainer.model.named_parameters()
        return {n: p.grad.float().clone() for n, p in named if p.grad is not None and ".ref." not in n}


def make_mid(directory: Path, layers: int | None) -> None:
    """Write a checkpoint of the size ``mid``, perhaps with fewer layers."""
    size = SIZES["mid"] if layers is None else replace(SIZES["mid"], layers=layers)
    policy = make_policy(size, torch.float32)
    policy.model.save_pretrained(directory)
    policy.processor.save_pretrained(directory)


def make_pairs(policy: Policy, prompt: Prompt, num_pairs: int, num_questions: int, sentence: int) -> list[Pair]:
    """Generate sibling pairs and questions about one image, and their logprobs under the policy."""
    generator = torch.Generator().manual_seed(0)
    words = [token for token in range(5, len(policy.tokenizer)) if token not in policy.image_token_ids]

    def draw(length: int) -> tuple[int, ...]:
        return tuple(words[i] for i in torch.randint(len(words), (length,), generator=generator).tolist())

    def pair(asked: Prompt, ids: tuple[tuple[int, ...], tuple[int, ...]]) -> Pair:
        logprobs = [float(lp.sum()) for lp in policy.teacher_forced([asked, asked], ids)]
        sides = [Response("1", i, lp, "", 1, 0.0, complete=True) for i, lp in zip(ids, logprobs, strict=True)]
        return Pair(prompt=asked, iteration=1, chosen=sides[0], rejected=sides[1])

    path = draw(3 * sentence)
    siblings = []
    for number in range(num_pairs):
        prefix = path[: number % 4 * sentence]
        # The rejected response is slightly shorter, so that a mix-up of lengths cannot go unnoticed.
        siblings.append(pair(prompt, (prefix + draw(sentence), prefix + draw(sentence - sentence // 8))))
    nouns = ("boat", "tree", "car", "dog")[:num_questions]
    asked = [Prompt(f"{prompt.prompt_id}?{noun}", prompt.image, f"Is there a {noun}?") for noun in nouns]
    return siblings + [pair(question, (draw(2), draw(2))) for question in asked]


def make_side(
    kind: str, checkpoint: Path, dtype: str, pairs: list[Pair], work: Path, stock_pairs: int, max_tokens: int
) -> Side:
    """Create a trainer, and move its policy slightly away from the reference."""
    torch.manual_seed(0)
    policy = trainable_policy(ModelConfig(path=str(checkpoint), dtype=dtype), TRAINING, None)
    arguments = trainer_arguments(TRAINING, work, 0, policy.device.type)
    trainer: Any
    if kind == "stock":
        trainer = stock_trainer(policy, arguments)
    else:
        disable_vision_gradients(policy.base_model)
        collator = (PairRows if kind == "pair rows" else PairCollator)(policy, max_tokens)
        tables.write_pairs(work / "pairs.parquet", pairs)
        files = PairFiles([work / "pairs.parquet"])
        trainer = CsrTrainer(policy, StepDataset(files, StepPlan(files.group_sizes, 16, 0), collator), arguments)
        trainer.first_loss = 0.0
    trainer.model.train()
    noise = torch.Generator().manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B.default" in name:
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=noise).to(parameter)
    if kind == "stock":
        return Side(trainer, lambda: [stock_batch(policy, part) for part in batched(pairs, stock_pairs)])
    return Side(trainer, lambda: collator.passes(pairs))


Gradients = dict[str, torch.Tensor]


def difference(ours: tuple[float, Gradients], stock: tuple[float, Gradients]) -> dict[str, float]:
    """Compare one step: loss relative to itself, gradients relative to the largest one."""
    (loss, actual), (expected_loss, expected) = ours, stock
    if actual.keys() != expected.keys():
        raise RuntimeError("the two trainers train different parameters")
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    furthest = max(float((actual[name] - gradient).abs().max()) for name, gradient in expected.items())
    return {"loss": abs(loss - expected_loss) / abs(expected_loss), "gradients": furthest / largest}


def measure(step: Callable[[], object]) -> tuple[float, float]:
    """Run a step; return its seconds, and the peak increase of memory in MB, of the GPU if there is one.

    Without a GPU these are CPU seconds of the process, which other load on the machine hardly changes.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, started = torch.cuda.memory_allocated(), time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - started, (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    memory, started = megabytes("VmRSS"), time.process_time()
    step()
    return time.process_time() - started, megabytes("VmHWM") - memory


def distinct_tokens(policy: Policy, pairs: Sequence[Pair]) -> int:
    """Count the distinct prefixes of all rows about one image, each of which ends with one token."""
    prefixes = set()
    for pair in pairs:
        prompt = policy.encode(pair.prompt).input_ids.tolist()
        for response in (pair.chosen, pair.rejected):
            row = (*prompt, *response.token_ids)
            prefixes |= {row[:end] for end in range(1, len(row) + 1)}
    return len(prefixes)


def count_tokens(run: Run) -> dict[str, Any]:
    """Count the tokens of an epoch of a run's first training."""
    files, training = PairFiles(run.training_paths(1)), run.config.training
    policy = load_policy(run.config.model, None, run.config.data.max_image_pixels)
    plan = StepPlan(files.group_sizes, pairs_per_step(training.trl), 0)
    steps = StepDataset(files, plan, PairCollator(policy, training.max_tokens))
    passes = [batch for step in range(len(steps)) for batch in steps[step]["passes"]]
    distinct = separate = 0
    for image in np.split(np.arange(len(files)), np.cumsum(files.group_sizes)[:-1]):
        pairs = files[image]
        distinct += distinct_tokens(policy, pairs)
        lengths = {pair.prompt: len(policy.encode(pair.prompt).input_ids) for pair in pairs}
        sides = [(pair.prompt, side.token_ids) for pair in pairs for side in (pair.chosen, pair.rejected)]
        separate += sum(lengths[prompt] + len(ids) for prompt, ids in sides)
    computed = sum(batch["rows"]["input_ids"].numel() for batch in passes)
    return {
        "pairs": len(files),
        "images": len(files.group_sizes),
        "passes": len(passes),
        "distinct": distinct,
        "computed / distinct": round(computed / distinct, 4),
        "separate / distinct": round(separate / distinct, 2),
    }


def time_training(run: Run, repeats: int) -> dict[str, Any]:
    """Train a run's first iteration in both kinds of rows; return CPU seconds, losses and the median ratio."""
    options = {**run.config.training.trl, "dataloader_num_workers": 0}
    training = run.config.training.model_copy(update={"trl": options})
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS[1:]}
    losses: dict[str, list[float]] = {}
    for turn, (kind, collator) in product(range(repeats), zip(KINDS[1:], (PairRows, PairCollator), strict=True)):
        with TemporaryDirectory() as directory, mock.patch.object(dpo, "PairCollator", collator):
            paths = {"adapter": Path(directory) / "adapter", "work": Path(directory) / "work"}
            started = time.process_time()
            result = dpo.train(
                run.training_paths(1), run.config.model, training, previous=None, seed=run.config.seed, **paths
            )
            seconds[kind].append(time.process_time() - started)
        losses[kind] = [float(entry["loss"]) for entry in result["log"]]
        print(f"turn {turn + 1}: {kind} {seconds[kind][-1]:.1f} s", flush=True)
    return {
        "pairs": result["num_pairs"],
        "steps": len(result["log"]),
        "seconds": seconds,
        "speedup": statistics.median(pair / tree for pair, tree in zip(*seconds.values(), strict=True)),
        "largest difference of a loss": max(abs(a - b) for a, b in zip(*losses.values(), strict=True)),
    }


def compare(
    checkpoint: Path, size: str, dtype: str, num_pairs: int, num_questions: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Verify and time one model in one precision on one tree."""
    with TemporaryDirectory() as directory:
        work = Path(directory)
        (prompt,) = write_images(list(make_scenes(HARBOUR, Split.DEVELOPMENT, 0, 1)), work)
        first = trainable_policy(ModelConfig(path=str(checkpoint), dtype=dtype), TRAINING, None)
        pairs = make_pairs(first, prompt, num_pairs, num_questions, arguments.tokens or SENTENCE[size])
        distinct = distinct_tokens(first, pairs)
        del first
        stock_pairs = arguments.stock_pairs or len(pairs)
        kinds = KINDS[1:] if arguments.without_stock else KINDS
        settings = checkpoint, dtype, pairs, work, stock_pairs, arguments.max_tokens
        sides = {kind: make_side(kind, *settings) for kind in kinds}
        losses: dict[str, float] = {}
        first = {kind: measure(lambda k=kind, s=side: losses.update({k: s.step()})) for kind, side in sides.items()}
        outcomes = {kind: (losses[kind], side.gradients()) for kind, side in sides.items()}
        turns = []
        for number in range(arguments.repeats):
            has_stock = number < (arguments.repeats if arguments.stock_repeats is None else arguments.stock_repeats)
            turns.append({kind: measure(side.step) for kind, side in sides.items() if kind != "stock" or has_stock})
        tokens = {kind: side.tokens() for kind, side in sides.items()}
    if "stock" in tokens:
        tokens["stock"] *= 2  # policy and reference
    measured = {kind: [turn[kind] for turn in turns if kind in turn] or [first[kind]] for kind in kinds}
    seconds = {kind: statistics.median(second for second, _ in values) for kind, values in measured.items()}
    ratios = {
        kind: [turn[kind][0] / turn["trees"][0] for turn in turns if kind in turn] or [seconds[kind] / seconds["trees"]]
        for kind in kinds[:-1]
    }
    return {
        "size": size,
        "dtype": dtype,
        "pairs": num_pairs,
        "questions": num_questions,
        "stock_pairs": stock_pairs,
        "max_tokens": arguments.max_tokens,
        "distinct_tokens": distinct,
        "tokens": tokens,
        "seconds": seconds,
        "speedup": {kind: statistics.median(values) for kind, values in ratios.items()},
        "turns": [{kind: second for kind, (second, _) in turn.items()} for turn in turns],
        "peak_megabytes": {kind: max(peak for _, peak in values) for kind, values in measured.items()},
        "difference": {kind: difference(outcomes[kind], outcomes[kinds[0]]) for kind in kinds[1:]},
    }


def print_row(row: dict[str, Any]) -> None:
    """Print a row as one line of text."""
    values = "  ".join(
        f"{kind} {seconds:.3f} s {row['peak_megabytes'][kind]:.0f} MB" for kind, seconds in row["seconds"].items()
    )
    ratios = " ".join(f"{ratio:.2f}" for ratio in row["speedup"].values())
    print(
        f"{row['size']:<5} {row['dtype']:<9} {row['pairs']:2} pairs {row['questions']} questions  {values}  "
        f"ratio {ratios}  tokens / distinct {row['tokens']['trees'] / row['distinct_tokens']:.3f}  "
        f"loss {row['difference']['trees']['loss']:.1e}  gradients {row['difference']['trees']['gradients']:.1e}",
        flush=True,
    )


def main() -> None:
    """Run the selected comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=sorted(SENTENCE), default=["tiny"])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--pairs", nargs="+", type=int, default=[2, 4, 12], help="sibling pairs of the prompt")
    parser.add_argument("--questions", nargs="+", type=int, default=[0, 4], help="claim questions; at most 4")
    parser.add_argument("--tokens", type=int, help="tokens per sentence; 8 for tiny and 20 for mid by default")
    parser.add_argument("--layers", type=int, help="layers of mid's language model; 12 by default")
    parser.add_argument("--stock-pairs", type=int, help="pairs of a batch of stock TRL; all by default")
    parser.add_argument("--max-tokens", type=int, default=TRAINING.max_tokens, help="tokens of a pass of ours")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-stock", action="store_true", help="do not run stock TRL")
    parser.add_argument("--stock-repeats", type=int, help="turns in which stock TRL is timed; all by default")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--count", type=Path, metavar="RUN", help="count the tokens of a run's training")
    parser.add_argument("--train", type=Path, metavar="RUN", help="time a run's training")
    arguments = parser.parse_args()
    quiet_libraries()
    if arguments.count is not None:
        print(json.dumps(count_tokens(Run.open(arguments.count)), indent=1))
        return
    if arguments.train is not None:
        print(json.dumps(time_training(Run.open(arguments.train), arguments.repeats), indent=1))
        return
    rows = []
    with TemporaryDirectory() as directory:
        for size in arguments.sizes:
            checkpoint = assets() / "llava" if size == "tiny" else Path(directory)
            if size == "mid":
                make_mid(checkpoint, arguments.layers)
            for dtype in arguments.dtypes:
                for num_pairs in arguments.pairs:
                    for num_questions in arguments.questions:
                        rows.append(compare(checkpoint, size, dtype, num_pairs, num_questions, arguments))
                        print_row(rows[-1])
    if arguments.out is not None:
        write_json(arguments.out, {"versions": versions(), "threads": torch.get_num_threads(), "rows": rows})
    failed = [
        row
        for row in rows
        if row["dtype"] == "float32" and max(row["difference"]["trees"].values()) > LARGEST_DIFFERENCE
    ]
    if failed:
        raise SystemExit(f"loss or gradients differ: {failed[0]['size']}, {failed[0]['difference']}")


if __name__ == "__main__":
    main()
