"""Write checkpoints inside training by time, and find the last complete one.

A checkpoint is transformers' own: adapter, optimizer, scheduler, random generators, log. Their files
are read with ``weights_only``, which runs no code. A marker, written last, makes the checkpoint
complete; only complete ones are resumed. The order of the pairs needs no state, since it follows
from the seed and the step.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from csr_vlm.store import files
from csr_vlm.training.distribution import max_over_processes
from csr_vlm.training.trainer import CsrTrainer

_MARKER = "complete.json"
_INPUTS = "inputs.json"


class TimedCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Write a checkpoint after the step that ends an interval, and delete the one before.

    Args:
        trainer: The trainer.
        minutes: Interval; 0 for a checkpoint after every step.
    """

    def __init__(self, trainer: CsrTrainer, minutes: float) -> None:
        self._trainer = trainer
        self._seconds = 60 * minutes
        self._last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Request a checkpoint; all processes decide alike."""
        elapsed = max_over_processes(time.monotonic() - self._last)
        if elapsed >= self._seconds and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the checkpoint as complete, and delete others."""
        accelerator = self._trainer.accelerator
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            files.flush_directory(checkpoint)
            content = {"first_loss": self._trainer.first_loss, "num_tokens": self._trainer._total_train_tokens}
            files.write_checksummed(checkpoint / _MARKER, content)
            for other in checkpoint.parent.glob("checkpoint-*"):
                if other != checkpoint:
                    shutil.rmtree(other, ignore_errors=True)
        self._last = time.monotonic()


def prepare_directory(work: Path, digest: str) -> None:
    """Empty the trainer's directory unless it belongs to a training with the same inputs.

    Args:
        work: Directory of the trainer's files.
        digest: Digest of everything that the result depends on.
    """
    path = work / _INPUTS
    if not path.exists() or files.read_json(path) != digest:
        shutil.rmtree(work, ignore_errors=True)
        files.write_json(path, digest)
    for checkpoint in work.glob("checkpoint-*"):
        if not (checkpoint / _MARKER).exists():
            shutil.rmtree(checkpoint)


def resume(trainer: CsrTrainer, work: Path) -> str | None:
    """Restore what transformers does not store; return the last complete checkpoint, or None."""
    complete = [path.parent for path in work.glob(f"checkpoint-*/{_MARKER}")]
    if not complete:
        return None
    last = max(complete, key=lambda path: int(path.name.rpartition("-")[2]))
    content = files.read_checksummed(last / _MARKER)
    trainer.first_loss = content["first_loss"]
    trainer._total_train_tokens = content["num_tokens"]
    return str(last)
