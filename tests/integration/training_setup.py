"""Build pairs, trainers and training files for the tests of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from csr_vlm.config.schema import ModelConfig, TrainingConfig
from csr_vlm.core.records import Pair, Prompt, Response
from csr_vlm.models.policy import Policy
from csr_vlm.store import tables
from csr_vlm.store.tables import PairFiles
from csr_vlm.training.collator import PairCollator
from csr_vlm.training.distribution import pairs_per_step
from csr_vlm.training.dpo import trainer_arguments
from csr_vlm.training.steps import StepDataset, StepPlan
from csr_vlm.training.trainer import CsrTrainer
from csr_vlm.world.demo import assets

MODEL = ModelConfig(path=str(assets() / "llava"), device="cpu")


def write_pairs(pairs: Sequence[Pair], directory: Path) -> list[Path]:
    """Write pairs to a file, as training reads them."""
    path = directory / "pairs.parquet"
    tables.write_pairs(path, pairs)
    return [path]


def response(policy: Policy, prompt: Prompt, text: str) -> Response:
    """Build a response with its log-probability under a policy."""
    ids = (*policy.tokenizer(text, add_special_tokens=False)["input_ids"], policy.tokenizer.eos_token_id)
    logprob = float(policy.teacher_forced([prompt], [ids])[0].sum())
    return Response("1", ids, logprob, text, num_sentences=text.count("."), reward=0.0, complete=True)


def our_trainer(policy: Policy, pairs: Sequence[Pair], work: Path, training: TrainingConfig) -> CsrTrainer:
    """Create the trainer of the package on some pairs."""
    files = PairFiles(write_pairs(pairs, work))
    collator = PairCollator(policy, training.max_tokens, sharing=training.packing == "auto")
    steps = StepDataset(files, StepPlan(files.group_sizes, pairs_per_step(training.trl), 0), collator)
    return CsrTrainer(policy, steps, trainer_arguments(training, work, 0, "cpu"))


def outcome(trainer: Any, passes: Sequence[dict[str, Any]]) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """Compute the loss, the gradients and the metrics of one step's passes."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    trainer.current_gradient_accumulation_steps = 1
    if isinstance(trainer, CsrTrainer):
        num_pairs = sum(len(batch["prompt_ids"]) for batch in passes)
        loss = trainer.training_step(trainer.model, {"passes": passes, "num_pairs": num_pairs, "is_idle": False})
    else:
        (batch,) = passes
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients, {key: values[-1] for key, values in trainer._metrics["train"].items()}
