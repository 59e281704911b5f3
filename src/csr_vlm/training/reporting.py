"""Where the trainer's reports go: ``training.trl.report_to`` names the services, TRL writes to them.

Every iteration is a training of its own, with its own steps from 1 on, so each gets a report of
its own; and what lies on disk must outlive the trainer's working directory.
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
"""Services whose package has the service's name."""


def require_services(report_to: str | list[str] | None) -> None:
    """Refuse a service that TRL does not know, or whose package is absent, before hours of work and not after.

    Raises:
        CsrError: There is such a one.
    """
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name not in {*INTEGRATION_TO_CALLBACK, "none", "all"}:
            near = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            raise CsrError(f"training.trl.report_to: {name!r} is unknown", hint)
        if name in _PACKAGED and name not in get_available_reporting_integrations():
            raise CsrError(f"training.trl.report_to: {name} is not installed", f"pip install {name}")


def report_name(work: Path) -> str:
    """Name a training after its run and its iteration, for services that list runs by name.

    Example:
        >>> report_name(Path("runs/mine/iteration-2/trainer"))
        'mine-iteration-2'
    """
    return f"{work.parent.parent.name}-{work.parent.name}"


def keep_reports(trainer: Trainer, directory: Path) -> None:
    """Let TensorBoard write to ``directory``, unless TENSORBOARD_LOGGING_DIR says where; end what was begun."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(directory)
    trainer.add_callback(EndOfReport())


class EndOfReport(TrainerCallback):  # type: ignore[misc]
    """Ends the Weights & Biases run that a training began: it would take in the next iteration's steps as well."""

    def __init__(self) -> None:
        self._before = _wandb_run()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = _wandb_run()
        if run is not None and run is not self._before:
            sys.modules["wandb"].finish()


def _wandb_run() -> Any:
    """Return the process's open run; the library is loaded only if something has to do with it."""
    return getattr(sys.modules.get("wandb"), "run", None)
