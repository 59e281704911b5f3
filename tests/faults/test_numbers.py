"""Test that non-finite numbers from models are rejected."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from trl import DPOTrainer

from csr_vlm.core.errors import CsrError
from csr_vlm.generation.decoding import PartialCandidate, _require_finite
from csr_vlm.training.dpo import CsrTrainer


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_error_for_non_finite_logits_names_the_prompt(value: float) -> None:
    rows = [PartialCandidate(1, index, (), np.zeros(1), prompt_id=name) for index, name in enumerate(("good", "bad"))]
    logits = torch.tensor([[0.0, -torch.inf], [value, 1.0]])
    with pytest.raises(CsrError, match="prompt bad: the policy computes logits that are not finite"):
        _require_finite(logits, rows)
    _require_finite(logits[:1], rows[:1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_loss_stops_training_and_names_the_prompts(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    trainer = object.__new__(CsrTrainer)
    trainer.first_loss, trainer.accelerator = 0.6931, SimpleNamespace()
    trainer.state = SimpleNamespace(global_step=4)
    monkeypatch.setattr(DPOTrainer, "compute_loss", lambda *args, **kwargs: torch.tensor(value))
    with pytest.raises(CsrError, match=r"DPO diverged: step 5 has the loss (nan|inf) on the pairs of prompts a, b"):
        trainer.compute_loss(None, {"prompt_ids": ["a", "b"]})


def test_a_non_finite_first_loss_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = object.__new__(CsrTrainer)
    trainer.beta = 0.1
    monkeypatch.setattr(CsrTrainer, "_sigmoid_loss", lambda *args: float("nan"))
    with pytest.raises(CsrError, match="the first DPO loss is nan"):
        trainer.compute_loss(None, {"completion_mask": torch.ones(2, 4)})
