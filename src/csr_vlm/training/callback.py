"""Forward the trainer's steps and metrics to a progress display."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from csr_vlm.core.progress import Progress

_DISPLAYED = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}
"""Display name of each metric of TRL that is shown."""


class _StepCounter(TrainerCallback):  # type: ignore[misc]
    """Count optimizer steps and forward what TRL logs."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the number of steps, and of those done before training was resumed."""
        self._progress.set_total(state.max_steps)
        self._progress.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step."""
        self._progress.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Forward the displayed metrics."""
        if logs:
            self._progress.log_metrics({name: float(logs[key]) for key, name in _DISPLAYED.items() if key in logs})


def count_steps(progress: Progress) -> TrainerCallback:
    """Return a callback that counts optimizer steps and forwards what TRL logs."""
    return _StepCounter(progress)
