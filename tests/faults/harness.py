"""Set up a complete run that takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from csr_vlm.config.load import resolve
from csr_vlm.store.run import Run
from csr_vlm.world.dataset import write_prompts
from csr_vlm.world.demo import assets
from csr_vlm.world.scenes import HARBOUR, Split


def tiny_run(root: Path, **changes: Any) -> Run:
    """Create a run with two iterations on nine images, in parts of three prompts."""
    data = root.parent / "data"
    if not data.exists():
        write_prompts(HARBOUR, Split.PROMPTS, 0, 9, data)
    layer = {
        "iterations": 2,
        "model": {"path": str(assets() / "llava"), "device": "cpu"},
        "scorer": {"path": str(assets() / "clip")},
        "data": {"prompts": str(data / "prompts.jsonl")},
        "method": {
            "search": {"max_sentences": 2, "num_candidates": 3},
            "claims": {"caption": HARBOUR.template.format("{a} {0}")},
            "pairs": {"require_complete": False, "min_margin": 0.5},
        },
        "generation": {"prompts_per_part": 3},
        "training": {
            "checkpoint_minutes": 0,
            "lora": {"r": 2},
            "trl": {"num_train_epochs": 1, "per_device_train_batch_size": 2},
        },
        "evaluation": {"heldout": 1, "audit": "off"},
        **changes,
    }
    return Run.create(root, resolve(layer))
