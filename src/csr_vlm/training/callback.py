"""The trainer's progress, handed to whoever shows it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from csr_vlm.core.progress import Advance

_SHOWN = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}
"""What TRL logs, and what it is called in progress."""


class _Counter(TrainerCallback):  # type: ignore[misc]
    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        set_total = getattr(self._advance, "set_total", None)
        if set_total is not None:
            set_total(state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        note = getattr(self._advance, "note", None)
        if note is not None and logs:
            note({name: float(logs[key]) for key, name in _SHOWN.items() if key in logs})


def count_steps(advance: Advance) -> TrainerCallback:
    """Count each optimiser step, and note what TRL logs of it."""
    return _Counter(advance)
