"""A whole run of seconds, and the process that forks, kills and watches it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csr_vlm.config.load import resolve
from csr_vlm.store.run import Run
from csr_vlm.world.dataset import write_prompts
from csr_vlm.world.demo import assets
from csr_vlm.world.scenes import HARBOUR, Split


def tiny_run(root: Path, **changes: Any) -> Run:
    """Set up two iterations over nine pictures, in parts of three: every stage there is, in seconds."""
    data = root.parent / "data"
    if not data.exists():
        write_prompts(HARBOUR, Split.PROMPTS, 0, 9, data)
    layer = {
        "iterations": 2,
        "model": {"path": str(assets() / "llava"), "device": "cpu"},
        "scorer": {"path": str(assets() / "clip")},
        "data": {"prompts": str(data / "prompts.jsonl")},
        "method": {"search": {"max_sentences": 2, "num_candidates": 3}, "pairs": {"require_complete": False}},
        "generation": {"prompts_per_part": 3},
        "training": {"lora": {"r": 2}, "trl": {"num_train_epochs": 1, "per_device_train_batch_size": 8}},
        "evaluation": {"heldout": 1, "audit": "off"},
        **changes,
    }
    return Run.create(root, resolve(layer))


@dataclass
class Ended:
    code: int
    """Of the exit, or the negative number of the signal that killed it."""
    said: str
    seconds: float
    cpu: float
    """Seconds of a processor, which a busy machine does not stretch."""


class Zygote:
    """Holds a :mod:`tests.faults.zygote`; give ``prefix`` to start it in a world of its own."""

    def __init__(self, *prefix: str) -> None:
        command = [*prefix, sys.executable, "-m", "tests.faults.zygote"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Zygote:
        assert self._answer() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, root: Path, **order: Any) -> Ended:
        """Run, or go on with, what is in a directory; see ``work`` and ``_listen`` there for orders."""
        return self._ask({"root": str(root), **order})

    def shell(self, command: str) -> None:
        ended = self._ask({"shell": command})
        assert ended.code == 0, ended.said

    def _ask(self, order: dict[str, Any]) -> Ended:
        assert self._process.stdin is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return Ended(**self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that forks has died"
        return json.loads(line)
