"""Provide the command line ``csr VERB``. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a command that Ctrl-C ended."""


def main() -> None:
    """Run the command line. A signal ends every verb in one line, also while the libraries are imported."""
    # Threads of PyTorch that wait for one another spin by default. Beside another busy process the one that is waited
    # for then has no core to run on. The variable is read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != process:  # a worker that inherited this handler ends as it would have without it
            os.kill(os.getpid(), number)
            return
        print(f"stopped by {signal.Signals(number).name}; rerun the same command", file=sys.stderr)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        from csr_vlm.cli.app import main as run_app

        run_app()
    except KeyboardInterrupt:
        print("interrupted; rerun the same command to resume", file=sys.stderr)
        sys.exit(INTERRUPTED)
