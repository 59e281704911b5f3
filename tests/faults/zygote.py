"""Runs to be killed: a process that has imported everything forks one for each order.

Orders come as lines of JSON on stdin, and what became of each goes to stdout. A fork starts in
a moment where a fresh interpreter takes ten seconds, so a hundred kills are a matter of minutes.
A plan makes the fork's own files fail: at its n-th file operation it is killed, its file is torn
and it is killed, or the operation raises an error of the system; or every operation is slow.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPERATIONS = ("replace", "fsync", "mkdir", "unlink", "rmdir")
"""All that :mod:`csr_vlm.store.files` and :mod:`shutil` do to names and disks goes through these."""
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EDQUOT": errno.EDQUOT}


def install(plan: dict[str, Any], root: Path) -> None:
    """Wrap the file operations of this process; those outside the run are left alone and not counted."""
    count = 0

    def wrapped(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal count
            place = Path(f"/proc/self/fd/{target}").readlink() if isinstance(target, int) else os.fspath(target)
            if not str(place).startswith(str(root)) and "dir_fd" not in kwargs:
                return operation(target, *args, **kwargs)
            count += 1
            if plan["do"] in ERRORS and name in ("unlink", "rmdir"):
                count -= 1  # A full disk does not keep anybody from deleting.
            elif plan["do"] == "slow":
                time.sleep(plan["seconds"])
            elif plan["do"] == "count":
                (root.parent / "count").write_text(str(count))
            elif count == plan["at"]:
                fail(name, str(place))
            return operation(target, *args, **kwargs)

        return call

    def fail(name: str, place: str) -> None:
        if plan["do"] in ERRORS:
            raise OSError(ERRORS[plan["do"]], os.strerror(ERRORS[plan["do"]]), place)
        if plan["do"] == "tear" and name in ("fsync", "replace") and Path(place).is_file():
            os.truncate(place, random.Random(plan["at"]).randrange(Path(place).stat().st_size + 1))
        os.kill(os.getpid(), signal.SIGKILL)

    for name in OPERATIONS:
        setattr(os, name, wrapped(name, getattr(os, name)))


def work(order: dict[str, Any]) -> None:
    """Run what a fork runs; it ends as the command line ends."""
    from csr_vlm.cli.error_messages import print_error as tell_error
    from csr_vlm.cli.signals import stoppable
    from csr_vlm.core.errors import CsrError
    from csr_vlm.core.progress import Silent
    from csr_vlm.pipeline.loop import align
    from csr_vlm.store.run import Run

    root = Path(order["root"])
    if "largest_file" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest_file"],) * 2)
    if "plan" in order:
        install(order["plan"], root)
    try:
        run = Run.open(root)
        with stoppable(Silent(), root) as reporter:
            align(run, reporter)
    except CsrError as error:
        tell_error(error)
        sys.exit(1)


def fork(order: dict[str, Any]) -> dict[str, Any]:
    """Let a fork work, kill it when it is due, and say how it ended."""
    reading, writing = os.pipe()
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.dup2(writing, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            work(order)
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    said = _listen(reading, child, order, started)
    _, status, used = os.wait4(child, 0)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "said": said,
        "seconds": time.perf_counter() - started,
        "cpu": used.ru_utime + used.ru_stime,
    }


def _listen(reading: int, child: int, order: dict[str, Any], started: float) -> str:
    """Gather what the fork says until it ends; send it signals when they are due."""
    due = sorted(((float(after), int(number)) for number, after in order.get("signals", {}).items()))
    said = b""
    while True:
        wait = max(due[0][0] - (time.perf_counter() - started), 0.0) if due else 600.0
        ready, _, _ = select.select([reading], [], [], wait)
        if not ready:
            os.kill(child, due.pop(0)[1] if due else signal.SIGKILL)
            continue
        more = os.read(reading, 1 << 16)
        if not more:
            os.close(reading)
            return said.decode(errors="replace")
        said += more


def serve() -> None:
    import torch

    torch.set_num_threads(1)
    from csr_vlm.cli.console import quiet_libraries

    quiet_libraries()
    for module in ("pipeline.loop", "cli.app", "training.dpo", "generation.transformers_engine",
                   "generation.self_check", "scoring.registry", "scoring.transformers_encoder",
                   "world.scene_evaluation", "evaluation.heldout"):  # fmt: skip
        __import__(f"csr_vlm.{module}")
    __import__("matplotlib.pyplot")

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "shell" in order:
            done = subprocess.run(order["shell"], shell=True, capture_output=True, text=True, check=False)
            answer = {"code": done.returncode, "said": done.stdout + done.stderr, "seconds": 0.0, "cpu": 0.0}
        else:
            answer = fork(order)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
