"""Record which test seeds have been used, and refuse to report a used one as new.

Scenes that were looked at before a setting was chosen are no test of it. So every test seed is
drawn from those that the ledger, ``docs/evidence/test_seeds.json``, does not list; it is listed
before the run begins; and each table that reports it is listed beside it. Commit the ledger
together with the tables.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from csr_vlm.core.errors import CsrError
from csr_vlm.core.seeds import EVALUATION_SEEDS
from csr_vlm.store import files

LEDGER = Path(__file__).parents[1] / "docs" / "evidence" / "test_seeds.json"
_DRAWN = "test_seed.json"
"""File in a results folder that names its seed."""


@dataclass(frozen=True)
class Origin:
    """Say which command of which commit uses a seed, and for what."""

    command: str
    commit: str
    purpose: str

    def record(self) -> dict[str, str]:
        today = datetime.now(UTC).date().isoformat()
        return {"date": today, "command": self.command, "commit": self.commit, "purpose": self.purpose}


def entries(ledger: Path) -> list[dict[str, Any]]:
    """Read the ledger: one entry for each test seed that was ever used."""
    if not ledger.exists():
        return []
    found: list[dict[str, Any]] = json.loads(ledger.read_text(encoding="utf-8"))["seeds"]
    return found


def seed_of(out: Path) -> int:
    """Return the test seed of a results folder.

    Raises:
        CsrError: None was drawn.
    """
    path = out / _DRAWN
    if not path.exists():
        raise CsrError(f"{out} has no test seed", "draw one: python benchmarks/evidence.py run --out " + str(out))
    return int(json.loads(path.read_text(encoding="utf-8"))["seed"])


def prepare(out: Path, ledger: Path, origin: Origin, rerun: int | None = None) -> int:
    """Return the test seed of a results folder; draw and record an unused one if it has none.

    Args:
        rerun: A used seed to use again; what it gives is reported as a rerun.

    Raises:
        CsrError: The folder's seed has been reported, or ``rerun`` was never used.
    """
    if rerun is not None:
        _record_rerun(ledger, origin, rerun)
        files.write_json(out / _DRAWN, {"seed": rerun})
        return rerun
    if (out / _DRAWN).exists():
        seed = seed_of(out)
        tables = _entry(ledger, seed)["tables"]
        if tables:
            raise CsrError(
                f"test seed {seed} of {out} has been reported in {tables[0]['path']}",
                f"choose another --out, which draws a new seed, or pass --rerun {seed}",
            )
        return seed
    seed = draw(ledger, origin)
    files.write_json(out / _DRAWN, {"seed": seed})
    return seed


def draw(ledger: Path, origin: Origin) -> int:
    """Draw a test seed that was never used, and record it."""
    used = entries(ledger)
    unused = sorted(set(EVALUATION_SEEDS["test"]) - {entry["seed"] for entry in used})
    if not unused:
        raise CsrError("every test seed has been used", "extend EVALUATION_SEEDS in csr_vlm/core/seeds.py")
    seed = random.SystemRandom().choice(unused)
    _write(ledger, [*used, {"seed": seed, **origin.record(), "tables": []}])
    return seed


def report(ledger: Path, seed: int, table: str, results: object, *, rerun: bool = False) -> str:
    """Record that a table reports a test seed; return a sentence for the table if the seed was used before.

    Writing the same table from the same results again changes nothing.

    Args:
        table: Path of the table, as the ledger names it.
        results: The table's numbers, which tell whether it is the same.

    Raises:
        CsrError: The seed was never recorded, or another table reports it and ``rerun`` is false.
    """
    found, digest = _entry(ledger, seed), _digest(results)
    earlier = [known for known in found["tables"] if (known["path"], known["results"]) != (table, digest)]
    again = earlier or found.get("reruns")
    if again and not rerun:
        where = earlier[0]["path"] if earlier else "a run before this one"
        raise CsrError(
            f"test seed {seed} was used by {where}; a table from it is not a test of new settings",
            "run with another --out, which draws a new seed, or pass --rerun",
        )
    used = entries(ledger)
    if len(earlier) == len(found["tables"]):
        new = {"path": table, "results": digest, "date": datetime.now(UTC).date().isoformat(), "rerun": bool(again)}
        for entry in used:
            if entry["seed"] == seed:
                entry["tables"].append(new)
        _write(ledger, used)
    if not again:
        return ""
    places = ", ".join(dict.fromkeys(known["path"] for known in earlier)) or found["purpose"]
    return f"**Rerun**: these test scenes (seed {seed}) were used before ({places}), so they do not test new settings."


def _entry(ledger: Path, seed: int) -> dict[str, Any]:
    for entry in entries(ledger):
        if entry["seed"] == seed:
            return entry
    raise CsrError(f"test seed {seed} is not in {ledger}", "restore the ledger, or run again with another --out")


def _record_rerun(ledger: Path, origin: Origin, seed: int) -> None:
    _entry(ledger, seed)
    used = entries(ledger)
    for entry in used:
        if entry["seed"] == seed:
            entry.setdefault("reruns", []).append(origin.record())
    _write(ledger, used)


def _digest(results: object) -> str:
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()[:16]


def _write(ledger: Path, used: list[dict[str, Any]]) -> None:
    files.write_json(ledger, {"seeds": sorted(used, key=lambda entry: int(entry["seed"]))})
