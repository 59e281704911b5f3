"""Test packing a ledger: fewer files, the same rows, nothing lost after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from csr_vlm.core.errors import CsrError
from csr_vlm.store import ledger, parts, tables
from csr_vlm.store.run import Run
from tests.faults.runs import write_run
from tests.unit.builders import CountedProgress

MUCH = 1_000_000


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return write_run(tmp_path / "run")


def folder(run: Run) -> Path:
    return run.iteration(1) / "ledger"


def names(run: Run) -> list[str]:
    return sorted(path.name for path in folder(run).iterdir())


def pack(run: Run, most_bytes: int) -> int:
    done: list[int] = []
    ledger.pack(run, 1, most_bytes, CountedProgress(done))
    return sum(done)


def test_the_name_of_a_part_gives_its_work_items() -> None:
    assert list(parts.items_of(Path(parts.part_name(7, "ab12")))) == [7]
    assert list(parts.items_of(Path(parts.packed_name(range(3, 6))))) == [3, 4, 5]
    assert parts.packed_name(range(3, 6)) == "part-000003-to-000005.parquet"


def test_packing_keeps_every_row(run: Run) -> None:
    before = list(ledger.trees(run, 1))
    assert pack(run, MUCH) == 3
    assert names(run) == ["part-000000-to-000002.parquet"]
    assert list(ledger.trees(run, 1)) == before
    (packed,) = run.ledger_parts(1)
    assert tables.count_groups(packed) == 3, "a reader holds no more than before"


def test_packed_files_grow_up_to_the_size_limit(run: Run) -> None:
    before = list(ledger.trees(run, 1))
    size = max(path.stat().st_size for path in run.ledger_parts(1))
    assert pack(run, 1) == 3
    assert len(names(run)) == 3, "none fits with another"
    assert pack(run, 2 * size) == 3
    assert names(run) == ["part-000000-to-000001.parquet", "part-000002-0123456789abcdef.parquet"]
    assert list(ledger.trees(run, 1)) == before
    assert pack(run, MUCH) == 2
    assert names(run) == ["part-000000-to-000002.parquet"]
    assert list(ledger.trees(run, 1)) == before
    assert pack(run, MUCH) == 1, "nothing left to do"


def test_a_kill_before_the_small_parts_are_deleted_neither_loses_nor_duplicates_rows(run: Run) -> None:
    before = list(ledger.trees(run, 1))
    small = {path: path.read_bytes() for path in run.ledger_parts(1)}
    pack(run, MUCH)
    for path, content in list(small.items())[1:]:
        path.write_bytes(content)
    assert [path.name for path in run.ledger_parts(1)] == ["part-000000-to-000002.parquet"]
    assert list(ledger.trees(run, 1)) == before
    pack(run, MUCH)
    assert names(run) == ["part-000000-to-000002.parquet"]


def test_an_incomplete_ledger_is_not_packed(run: Run) -> None:
    first, second, _ = run.ledger_parts(1)
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(CsrError, match="is missing; it held 32 rows"):
        pack(run, MUCH)
    second.write_bytes(content[:200])
    with pytest.raises(CsrError, match="was changed after it was written"):
        pack(run, MUCH)
    assert first.exists()
    assert len(names(run)) == 3


def test_two_parts_of_one_work_item_are_noticed(run: Run) -> None:
    first, *_ = run.ledger_parts(1)
    first.with_name("part-000000-fedcba9876543210.parquet").write_bytes(first.read_bytes())
    with pytest.raises(CsrError, match="has 4 ledger parts instead of 3"):
        ledger.trees(run, 1)
