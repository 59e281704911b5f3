"""Fork runs and commands from a process that has imported everything.

Requests are lines of JSON on stdin; the result of each is a line of JSON on stdout. A fork
starts at once where a new interpreter takes ten seconds, so a hundred kills take minutes. A
plan disturbs the operations of the fork on files, or of training on weights: at the n-th, the
process is killed, the file is truncated and the process is killed, or the operation raises an
OSError; or every operation is slow. ``within`` is a part of the paths that a plan is about.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import resource
import runpy
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPERATIONS = ("replace", "fsync", "mkdir", "unlink", "rmdir")
"""Functions of :mod:`os` through which :mod:`csr_vlm.store.files` and :mod:`shutil` change files and folders."""
NOT_REFUSED = ("unlink", "rmdir", "update")
"""Operations that a full or failing disk allows: deleting files, and a step of an optimizer."""
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EDQUOT": errno.EDQUOT}


def install(plan: dict[str, Any], root: Path) -> None:
    """Wrap the operations of this process; those outside the run are neither disturbed nor recorded."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    count = 0

    def reach(name: str, path: str) -> None:
        """Count an operation, and do what the plan says before it."""
        nonlocal count
        is_refused = plan["do"] in ERRORS and name in NOT_REFUSED
        if not path.startswith(str(root)) or plan.get("within", "") not in path or is_refused:
            return
        count += 1
        if plan["do"] == "slow":
            time.sleep(plan["seconds"])
        elif plan["do"] == "record":
            with (root.parent / "operations").open("a") as file:
                print(name, path, file=file)
        elif count == plan["at"]:
            fail(name, path)

    def wrapped(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *args: Any, **kwargs: Any) -> Any:
            reach(name, path_of(target, kwargs.get("dir_fd")))
            return operation(target, *args, **kwargs)

        return call

    def fail(name: str, path: str) -> None:
        if plan["do"] in ERRORS:
            raise OSError(ERRORS[plan["do"]], os.strerror(ERRORS[plan["do"]]), path)
        if plan["do"] == "tear" and name in ("fsync", "replace") and Path(path).is_file():
            os.truncate(path, random.Random(plan["at"]).randrange(Path(path).stat().st_size + 1))
        os.kill(os.getpid(), signal.SIGKILL)

    for name in OPERATIONS:
        setattr(os, name, wrapped(name, getattr(os, name)))
    register_optimizer_step_pre_hook(lambda *_: reach("update", f"{root}/update"))


def path_of(target: Any, folder: int | None) -> str:
    """Return the path of an operation's file, which may be open or in an open folder."""
    if isinstance(target, int):
        return str(Path(f"/proc/self/fd/{target}").readlink())
    return str(target if folder is None else Path(f"/proc/self/fd/{folder}").readlink() / target)


def work(request: dict[str, Any]) -> None:
    """Run or resume a run in a fork, with the exit codes of the command line."""
    from csr_vlm.cli.error_messages import print_error
    from csr_vlm.cli.signals import stoppable
    from csr_vlm.core.errors import CsrError
    from csr_vlm.core.progress import Silent
    from csr_vlm.pipeline.loop import align
    from csr_vlm.store.run import Run

    root = Path(request["root"])
    if "largest_file" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"],) * 2)
    if "plan" in request:
        install(request["plan"], root)
    try:
        run = Run.open(root)
        with stoppable(Silent(), root) as reporter:
            align(run, reporter)
    except CsrError as error:
        print_error(error)
        sys.exit(1)


def execute(request: dict[str, Any]) -> None:
    """Execute a command line of csr, or a script with these arguments, in a fork."""
    from csr_vlm.cli import main

    os.setsid()
    os.chdir(request["folder"])
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        path = request["out"] if request["out"] == os.devnull else f"{request['out']}/{name}"
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    script = request.get("script")
    sys.argv = [script or "csr", *request["arguments"]]
    if script:
        sys.path.insert(0, str(Path(script).parent))
        runpy.run_path(script, run_name="__main__")
    else:
        main()


def start(request: dict[str, Any]) -> int:
    """Execute a command line in a fork; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        execute(request)
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int, *, waits: bool) -> int | None:
    """Return the exit code of a fork; None while it runs."""
    reaped, status = os.waitpid(child, 0 if waits else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if reaped else None


def fork(request: dict[str, Any]) -> dict[str, Any]:
    """Run a request in a fork, send it the signals of the request, and return how it ended."""
    reading, writing = os.pipe()
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.dup2(writing, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            work(request)
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    output = _read_output(reading, child, request, started)
    _, status, used = os.wait4(child, 0)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "output": output,
        "seconds": time.perf_counter() - started,
        "cpu": used.ru_utime + used.ru_stime,
    }


def _read_output(reading: int, child: int, request: dict[str, Any], started: float) -> str:
    """Read the output of the fork until it ends; send it signals when they are due."""
    due = sorted(((float(after), int(number)) for number, after in request.get("signals", {}).items()))
    output = b""
    while True:
        wait = max(due[0][0] - (time.perf_counter() - started), 0.0) if due else 600.0
        ready, _, _ = select.select([reading], [], [], wait)
        if not ready:
            os.kill(child, due.pop(0)[1] if due else signal.SIGKILL)
            continue
        more = os.read(reading, 1 << 16)
        if not more:
            os.close(reading)
            return output.decode(errors="replace")
        output += more


def answered(code: int | None, output: str = "") -> dict[str, Any]:
    return {"code": code, "output": output, "seconds": 0.0, "cpu": 0.0}


def serve() -> None:
    import torch

    torch.set_num_threads(1)
    from csr_vlm.cli.console import quiet_libraries
    from csr_vlm.method.claims import claim_finder

    quiet_libraries()
    for module in ("pipeline.loop", "cli.app", "training.dpo", "generation.transformers_engine",
                   "generation.self_check", "scoring.registry", "scoring.transformers_encoder",
                   "world.scene_evaluation", "evaluation.heldout", "report.html", "training.trial"):  # fmt: skip
        __import__(f"csr_vlm.{module}")
    for module in ("matplotlib.pyplot", "scipy.stats", "transformers.models.clip.modeling_clip",
                   "transformers.models.llava.modeling_llava", "transformers.models.llama.modeling_llama"):  # fmt: skip
        __import__(module)
    claim_finder()
    gc.collect()
    gc.freeze()  # forks collect only what they make themselves

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "shell" in request:
            done = subprocess.run(request["shell"], shell=True, capture_output=True, text=True, check=False)
            answer = answered(done.returncode, done.stdout + done.stderr)
        elif "arguments" in request:
            child = start(request)
            answer = answered(ended(child, waits=True) if request.get("waits", True) else child)
        elif "pid" in request:
            answer = answered(ended(request["pid"], waits=request["waits"]))
        else:
            answer = fork(request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
