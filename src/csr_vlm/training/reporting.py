"""Configure experiment trackers: ``training.trl.report_to`` names them, TRL writes to them.

Every iteration is a training of its own, with its own steps from 1, so each gets a report of its
own; and what is written to disk must outlive the trainer's working directory.
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from csr_vlm.core.errors import CsrError

_PACKAGED = ("tensorboard", "wandb", "trackio")
"""Trackers whose package has the tracker's name."""


def require_services(report_to: str | list[str] | None) -> None:
    """Check before any work that TRL supports the trackers, and that their packages are installed.

    Raises:
        CsrError: A tracker is not supported, or its package is not installed.
    """
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name not in {*INTEGRATION_TO_CALLBACK, "none", "all"}:
            near = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            options = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            hint = f"did you mean {near[0]}?" if near else f"expected one of: {options}"
            raise CsrError(f"training.trl.report_to: {name!r} is not a valid tracker", hint)
        if name in _PACKAGED and name not in get_available_reporting_integrations():
            raise CsrError(f"training.trl.report_to: {name} is not installed", f"pip install {name}")


def report_name(work: Path) -> str:
    """Return the name of a training for trackers that list runs by name: its run and its iteration.

    Example:
        >>> report_name(Path("runs/llava/iteration-2/trainer"))
        'llava-iteration-2'
    """
    return f"{work.parent.parent.name}-{work.parent.name}"


def configure_trackers(trainer: Trainer, directory: Path) -> None:
    """Make TensorBoard write to ``directory``, unless TENSORBOARD_LOGGING_DIR is set, and end wandb runs."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(directory)
    trainer.add_callback(FinishWandbRun())


class FinishWandbRun(TrainerCallback):  # type: ignore[misc]
    """End the Weights & Biases run that a training started; the next iteration would log to it otherwise."""

    def __init__(self) -> None:
        self._run_before = _wandb_run()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the run, unless it was open before the training."""
        run = _wandb_run()
        if run is not None and run is not self._run_before:
            sys.modules["wandb"].finish()


def _wandb_run() -> Any:
    """Return the process's open run, or None; the library is not imported for this."""
    return getattr(sys.modules.get("wandb"), "run", None)
