"""Set up a complete run that takes seconds, and control the process that forks, kills and monitors it."""

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


@dataclass
class ProcessResult:
    code: int
    """Exit code, or the negative number of the signal that killed the process."""
    output: str
    seconds: float
    cpu: float
    """CPU time in seconds, which does not depend on other load."""


class Zygote:
    """Control a :mod:`tests.faults.zygote` process; ``prefix`` is a command that starts it, such as ``unshare``."""

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

    def run(self, root: Path, **request: Any) -> ProcessResult:
        """Run or resume the run in a directory; ``work`` and ``_read_output`` of the zygote define the requests."""
        return self._ask({"root": str(root), **request})

    def shell(self, command: str) -> None:
        result = self._ask({"shell": command})
        assert result.code == 0, result.output

    def _ask(self, request: dict[str, Any]) -> ProcessResult:
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return ProcessResult(**self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the zygote process has died"
        return json.loads(line)
