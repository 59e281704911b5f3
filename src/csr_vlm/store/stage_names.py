"""Name the stages of a run, in order; :func:`csr_vlm.pipeline.schedule.schedule` makes the steps of a run of them."""

from __future__ import annotations

from collections.abc import Mapping

BASE_STAGES = ("prompts", "evaluate")
"""Stages of iteration 0, the base model."""
ITERATION_STAGES = ("generate", "pairs", "audit", "train", "evaluate", "gate")
"""Stages of every later iteration."""
LEDGER_STAGES = frozenset({"generate", "audit"})
"""Stages that need a ledger; an iteration that trains on offline pairs skips them."""
GATES: Mapping[str, str] = {"audit": "Pairs, before training", "gate": "Policy, after training"}
"""Stages that can stop a run, and what each checks."""
TIMED_STAGES = tuple(stage for stage in ITERATION_STAGES if stage not in GATES)
"""Stages that record their duration; the others take seconds."""
LABELS: Mapping[str, str] = {
    "prompts": "inputs",
    "generate": "search",
    "pairs": "pairs",
    "audit": "pair audit",
    "train": "training",
    "evaluate": "evaluation",
    "gate": "policy audit",
}
"""Names of the stages for people."""
