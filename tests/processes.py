"""Execute runs with several processes, and read the results that must not depend on their number."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from csr_vlm.config.schema import RunConfig
from csr_vlm.store import tables
from csr_vlm.store.run import Run
from tests.integration.conftest import small_config

CSR = (sys.executable, "-m", "csr_vlm.cli")
PART_OF_A_SECOND = 0.02


def sharing_config(directory: Path, **changes: object) -> RunConfig:
    """Short trees of sixteen pictures in eight work items, and three full steps of DPO proper."""
    return small_config(
        directory,
        **{
            "iterations": 1,
            "method": {"search": {"max_sentences": 2}, "pairs": {"require_complete": False}},
            "evaluation": {"heldout": 0},
            "generation": {"prompts_per_part": 2},
            # Means over the tokens of a batch, such as sft, depend on how batches are cut; DPO's own loss does not.
            "training": {
                "trl": {
                    "per_device_train_batch_size": 4,
                    "learning_rate": 1e-3,
                    "max_steps": 3,
                    "loss_type": ["sigmoid"],
                    "loss_weights": [1.0],
                }
            },
            **changes,
        },
    )


def run_alone(directory: Path) -> Run:
    """Execute a run of :func:`sharing_config` with one process, as the reference."""
    run = Run.create(directory / "run", sharing_config(directory))
    assert finished(*CSR, "run", run.root, "--quiet").returncode == 0
    return run


def another(alone: Run, directory: Path) -> Run:
    """Create the same run without executing it."""
    return Run.create(directory / "run", alone.config)


def launch(processes: int) -> tuple[str, ...]:
    """Return the command prefix that runs a verb with torchrun."""
    return (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "csr_vlm.cli")


@contextmanager
def started(*command: object, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Start a command with one thread per process; kill it and its descendants at the end."""
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def finished(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    with started(*command, **environment) as process:
        out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, f"it ended before it could be disturbed: {process.communicate()[1]}"
        time.sleep(PART_OF_A_SECOND)


def below(process: subprocess.Popen[str], word: str) -> list[psutil.Process]:
    """List the descendants of a process whose command lines contain a word."""
    return [
        child for child in psutil.Process(process.pid).children(recursive=True) if word in " ".join(child.cmdline())
    ]


def ledger(root: Path) -> dict[str, bytes]:
    """Map the name of each ledger part of all iterations to its bytes."""
    return {str(part.relative_to(root)): part.read_bytes() for part in sorted(root.rglob("part-*.parquet"))}


def results(root: Path) -> dict[str, bytes]:
    """Map the name of each file that must not depend on disturbances of a run to its bytes."""
    kept = (
        *("part-*.parquet", "pairs.parquet", "questions.parquet", "prompts.parquet", "heldout.parquet"),
        "adapter_model.safetensors",
    )
    return {str(p.relative_to(root)): p.read_bytes() for name in kept for p in sorted(root.rglob(name))}


def require_every_node_once(run: Run) -> None:
    nodes = [node for part in run.ledger_parts(1) for node in tables.read_nodes(part)]
    keys = [(node.prompt_id, node.node_id) for node in nodes]
    assert len(set(keys)) == len(keys) == run.result(1, "generate")["nodes"]
    assert {key[0] for key in keys} == {prompt.prompt_id for prompt in run.prompts()}


@dataclass
class ProcessResult:
    code: Any
    """Exit code, or the negative number of the signal that killed the process."""
    output: str
    seconds: float
    cpu: float
    """CPU time in seconds, which does not depend on other load."""


class Zygote:
    """Control a :mod:`tests.zygote` process; ``prefix`` is a command that starts it, such as ``unshare``."""

    def __init__(self, *prefix: str) -> None:
        command = [*prefix, sys.executable, "-m", "tests.zygote"]
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

    def execute(self, arguments: list[str], out: Path, script: Path | None) -> ProcessResult:
        """Execute a command line of csr, or a script; its output goes to ``stdout`` and ``stderr`` in a folder."""
        request = {"arguments": arguments, "folder": str(Path.cwd()), "out": str(out)}
        return self._ask(request | ({"script": str(script)} if script else {}))

    def start(self, arguments: list[str]) -> Fork:
        """Start a command line in a session of its own, without waiting for it."""
        request = {"arguments": arguments, "folder": str(Path.cwd()), "out": os.devnull, "waits": False}
        return Fork(self, self._ask(request).code)

    def ended(self, pid: int, *, waits: bool) -> int | None:
        """Return the exit code of a started command; None while it runs."""
        return self._ask({"pid": pid, "waits": waits}).code

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


@dataclass(frozen=True)
class Fork:
    """A command that :meth:`Zygote.start` has started, with the methods of :class:`subprocess.Popen`."""

    zygote: Zygote
    pid: int

    def poll(self) -> int | None:
        return self.zygote.ended(self.pid, waits=False)

    def wait(self) -> int | None:
        return self.zygote.ended(self.pid, waits=True)


@cache
def zygote() -> Zygote:
    """Return the process whose forks execute the commands of all tests of this worker."""
    return Zygote().__enter__()


def csr(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Execute a command of csr in a fork, which saves the seconds of the imports."""
    return _in_fork(arguments, check)


def run_script(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Execute a script in a fork."""
    return _in_fork(arguments, True, script)


def _in_fork(arguments: Iterable[object], check: bool, script: Path | None = None) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        words = [str(word) for word in arguments]
        code = zygote().execute(words, Path(folder), script).code
        out, err = (Path(folder, name).read_text(errors="replace") for name in ("stdout", "stderr"))
    assert code == 0 or not check, f"{script or 'csr'} {' '.join(words)} ended with {code}: {err}"
    return subprocess.CompletedProcess(words, code, out, err)
