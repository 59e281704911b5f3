"""Compare what a small demo run computes before and after a change: ``make golden``.

The first call records the golden run, every later one reruns the demo and compares: ledgers,
pairs, questions, log-probabilities, adapter tensors and metrics must be equal. Values are
compared, not file names, so a renamed file or column order does not matter. The golden
values hold on one machine only; record them before the change, on the commit it starts from.

    python benchmarks/golden.py build/golden.json [--run RUN]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors import safe_open

DEMO = ("demo", "--seed", "0", "--prompts", "48", "--scenes", "100", "--quiet", "--out")
_LOCATIONS = {"image"}
"""Columns that hold paths: compared by file name only."""


def digests(run: Path) -> dict[str, str]:
    """Map each artifact of a run to the SHA-256 of its values."""
    found = {}
    for iteration in sorted(run.glob("iteration-*")):
        for path in sorted((*iteration.glob("ledger/*.parquet"), *iteration.glob("*.parquet"))):
            found[path.relative_to(run).as_posix()] = _digest(_rows(path))
        for path in sorted(iteration.glob("adapter/*.safetensors")):
            found[path.relative_to(run).as_posix()] = _digest(_tensors(path))
        for path in sorted(iteration.glob("eval/*.json")):
            document = json.loads(path.read_text(encoding="utf-8"))
            for key in ("metrics", "rows"):
                found[f"{path.relative_to(run).as_posix()}:{key}"] = _digest(document[key])
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = pq.read_table(path).to_pylist()
    return [{key: Path(v).name if key in _LOCATIONS else v for key, v in row.items()} for row in rows]


def _tensors(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as tensors:
        return {
            name: hashlib.sha256(tensors.get_tensor(name).numpy().tobytes()).hexdigest()
            for name in sorted(tensors.keys())
        }


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Name every artifact that is missing, new or different."""
    return [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("golden", type=Path, help="file of recorded digests; written if it does not exist")
    parser.add_argument("--run", type=Path, help="a finished run to use instead of a new one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        run = options.run or Path(work) / "run"
        if options.run is None:
            command = [sys.executable, "-m", "csr_vlm.cli", *DEMO, str(run)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        found = digests(run)
    if not options.golden.exists():
        options.golden.parent.mkdir(parents=True, exist_ok=True)
        options.golden.write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(f"recorded {len(found)} artifacts in {options.golden}")
        return 0
    changed = differences(json.loads(options.golden.read_text(encoding="utf-8")), found)
    print("\n".join(f"differs: {name}" for name in changed) or f"equal: {len(found)} artifacts")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
