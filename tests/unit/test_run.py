"""Test the run directory: complete or absent files, resuming, locking, markers."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Silent
from csr_vlm.core.records import SCHEMA_VERSION
from csr_vlm.store import files, tables
from csr_vlm.store.progress_file import record_progress
from csr_vlm.store.run import Run, differences
from tests.unit.builders import config, node, prompt


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", config())


def test_write_atomically_writes_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    files.write_text(path, "whole\n")
    assert path.read_text() == "whole\n"
    assert names(path.parent) == {"file.txt"}


def test_the_file_does_not_exist_until_it_is_complete(tmp_path):
    path = tmp_path / "file.txt"

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.parent == path.parent, "a rename is atomic within one file system only"
        temporary.write_text("whole")

    files.write_atomically(path, write)
    assert path.read_text() == "whole"


@pytest.mark.parametrize("before", [None, "old"])
def test_a_failing_writer_leaves_the_old_file(tmp_path, before):
    path = tmp_path / "file.txt"
    if before is not None:
        path.write_text(before)

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="disk is full"):
        files.write_atomically(path, fail)
    assert names(tmp_path) == (set() if before is None else {"file.txt"})
    assert before is None or path.read_text() == before


def test_a_writer_that_writes_nothing_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.write_atomically(tmp_path / "file.txt", lambda temporary: None)
    assert names(tmp_path) == set()


def test_a_writer_killed_halfway_leaves_no_part(tmp_path):
    run = Run.create(tmp_path / "run", config())
    part = run.iteration(1) / "ledger" / "part-000000.parquet"
    script = (
        "import os, sys; from pathlib import Path; from csr_vlm.store.files import write_atomically\n"
        "def half(temporary):\n    temporary.write_text('half'); os._exit(9)\n"
        "write_atomically(Path(sys.argv[1]), half)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(part)], check=False).returncode == 9
    assert run.ledger_parts(1) == []
    tables.write_nodes(part, [node("0")])
    assert run.ledger_parts(1) == [part]


def test_json_round_trips_and_does_not_depend_on_the_order_of_keys(tmp_path):
    files.write_json(tmp_path / "a.json", {"b": "Café", "a": [1, None]})
    files.write_json(tmp_path / "b.json", {"a": [1, None], "b": "Café"})
    assert files.read_json(tmp_path / "a.json") == {"b": "Café", "a": [1, None]}
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_hashes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert files.sha256_of(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.digest({"a": 1, "b": [2]}) == files.digest({"b": [2], "a": 1})
    assert files.digest({"a": 1}) != files.digest({"a": 2})


def test_create_writes_the_resolved_configuration(run):
    assert Run.open(run.root).config == run.config == config()


def test_the_same_settings_resume(run):
    run.mark_done(1, "generate", nodes=3)
    again = Run.create(run.root, config())
    assert again == run
    assert again.is_done(1, "generate")


def test_a_run_without_a_finished_stage_accepts_other_settings(run):
    other = Run.create(run.root, config(seed=7))
    assert Run.open(run.root).config == other.config
    assert other.config.seed == 7


def test_changed_settings_are_rejected_by_name(run):
    run.mark_done(0, "prompts", accepted=1)
    before = (run.root / "config.yaml").read_bytes()
    with pytest.raises(CsrError) as caught:
        Run.create(run.root, config(seed=7, method={"lambda": 0.125, "search": {"keep_top": 3}}))
    for key in ("seed", "method.lambda", "method.search.keep_top"):
        assert key in caught.value.message
    assert "keep_bottom" not in caught.value.message, "what agrees is not named"
    assert caught.value.hint
    assert (run.root / "config.yaml").read_bytes() == before


def test_the_name_of_the_preset_is_a_setting(run):
    run.mark_done(0, "prompts", accepted=1)
    with pytest.raises(CsrError, match="preset"):
        Run.create(run.root, config(preset="only_rt", method={"lambda": 0.5}))


def test_a_run_can_be_extended_but_not_shortened(run):
    run.mark_done(0, "prompts", accepted=1)
    longer = Run.create(run.root, config(iterations=run.config.iterations + 2))
    assert Run.open(run.root).config == longer.config
    assert longer.config.iterations == run.config.iterations + 2
    with pytest.raises(CsrError, match="iterations"):
        Run.create(run.root, run.config)


def test_differences():
    left = {"a": 1, "b": {"c": 2, "d": [1]}, "e": None}
    right = {"a": 1, "b": {"c": 3, "d": [2]}, "f": 4}
    assert set(differences(left, right)) == {"b.c", "b.d", "f"}
    assert list(differences(left, left)) == []


def test_a_directory_without_a_run_is_rejected(tmp_path):
    with pytest.raises(CsrError, match="not a run directory"):
        Run.open(tmp_path)


def test_a_file_in_place_of_the_directory_is_rejected(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(CsrError, match="is a file"):
        Run.create(tmp_path / "file", config())
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("content", [b"", b"- 1\n", b"a: [1\n", b"\xff\xfe\x00", b"model: {path: m}\n", b"sed: 1\n"])
def test_a_damaged_configuration_is_rejected(run, content):
    (run.root / "config.yaml").write_bytes(content)
    with pytest.raises(CsrError):
        Run.open(run.root)
    with pytest.raises(CsrError):
        Run.create(run.root, config())


def test_the_lock_rejects_a_second_holder_and_is_released(run):
    with run.locked(), pytest.raises(CsrError, match="another process"), Run.open(run.root).locked():
        pytest.fail("two hold the lock")
    with run.locked():
        pass


def test_the_lock_is_released_after_an_error(run):
    with pytest.raises(ZeroDivisionError), run.locked():
        raise ZeroDivisionError
    with run.locked():
        pass


def test_the_lock_rejects_a_second_process(run):
    script = (
        "import sys\nfrom pathlib import Path\nfrom csr_vlm.core.errors import CsrError\n"
        "from csr_vlm.store.run import Run\n"
        "try:\n    with Run.open(Path(sys.argv[1])).locked(): print('held')\n"
        "except CsrError: print('refused')"
    )

    def second() -> str:
        command = [sys.executable, "-c", script, str(run.root)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with run.locked():
        assert second() == "refused"
    assert second() == "held"


def test_the_error_names_the_process_that_holds_the_lock(run):
    with run.locked():
        holder = files.read_json(run.root / ".lock.json")
        with pytest.raises(CsrError, match=rf"process {holder['pid']} on .+, since 20"), Run.open(run.root).locked():
            pytest.fail("two hold the lock")
        (run.root / ".lock.json").write_text("{")
        with pytest.raises(CsrError, match=r"in use by another process \(wait"), Run.open(run.root).locked():
            pytest.fail("two hold the lock")
    assert not (run.root / ".lock.json").exists()


def test_a_lock_file_left_by_a_killed_process_does_not_lock(run):
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom csr_vlm.store.run import Run\n"
        "with Run.open(Path(sys.argv[1])).locked(): os._exit(9)"
    )
    command = [sys.executable, "-c", script, str(run.root)]
    assert subprocess.run(command, check=False).returncode == 9
    assert (run.root / ".lock").exists()
    assert not run.in_use()
    with run.locked():
        assert run.in_use()
    assert not run.in_use()


def test_a_run_of_an_earlier_version_opens_if_its_former_options_were_off(run):
    path = run.root / "config.yaml"
    layer = yaml.safe_load(path.read_text())
    layer["method"]["search"]["filters"]["non_latin"] = False
    path.write_text(yaml.safe_dump(layer))
    assert Run.open(run.root).config == run.config
    layer["method"]["search"]["filters"]["non_latin"] = True
    path.write_text(yaml.safe_dump(layer))
    with pytest.raises(CsrError, match=r"is an option of version 0\.1"):
        Run.open(run.root)


@pytest.mark.parametrize("target_exists", [True, False])
def test_a_symbolic_link_in_place_of_the_lock_is_not_followed(run, tmp_path, target_exists):
    target = tmp_path / "precious"
    if target_exists:
        target.write_text("content")
    (run.root / ".lock").unlink()
    (run.root / ".lock").symlink_to(target)
    with pytest.raises(CsrError, match="is a symbolic link"), run.locked():
        pytest.fail("the lock followed the link")
    assert target.exists() is target_exists
    assert not target_exists or target.read_text() == "content"


def test_a_lock_can_be_released_by_another_thread(run):
    lock = run.locked()
    lock.__enter__()
    thread = threading.Thread(target=lock.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert not run.in_use()


def test_in_use_falls_back_to_the_progress_file_without_write_access(run, monkeypatch):
    def denied(directory):
        raise PermissionError

    monkeypatch.setattr("csr_vlm.store.run.is_locked", denied)
    assert not run.in_use()
    with record_progress(run.root, Silent()):
        assert run.in_use()
    assert not run.in_use()


def test_markers(run):
    assert not run.is_done(1, "pairs")
    run.mark_done(1, "pairs", pairs=12, prompts_without={"margin": 3})
    assert run.is_done(1, "pairs")
    assert run.result(1, "pairs") == {"pairs": 12, "prompts_without": {"margin": 3}}
    assert not run.is_done(2, "pairs")
    assert not run.is_done(1, "train")


def test_last_trained(run):
    assert run.last_trained == 0
    run.mark_done(1, "train")
    run.mark_done(2, "generate")
    assert run.last_trained == 1
    run.mark_done(2, "train")
    assert run.last_trained == 2


def test_the_base_model_has_no_adapter(run):
    assert run.adapter_path(0) is None
    assert run.adapter_path(2) == run.root / "iteration-2" / "adapter"


def test_the_manifest_holds_provenance_and_markers(run):
    run.mark_done(0, "prompts", accepted=5, dropped={"missing": 2})
    run.mark_done(1, "generate", nodes=40)
    manifest = json.loads((run.root / "manifest.json").read_text())
    assert manifest["schema"] == SCHEMA_VERSION
    assert manifest["seed"] == run.config.seed
    assert manifest["stages"]["iteration-0"] == {"prompts": {"accepted": 5, "dropped": {"missing": 2}}}
    assert manifest["stages"]["iteration-1"] == {"generate": {"nodes": 40}}
    assert {"python", "torch", "transformers", "pyarrow"} <= manifest["versions"].keys()
    assert manifest["git"] is None or len(manifest["git"]) == 40
    assert manifest["written"].endswith("Z")


def test_the_manifest_can_be_written_again(run):
    run.mark_done(1, "generate", nodes=40)
    (run.root / "manifest.json").unlink()
    run.write_manifest()
    assert files.read_json(run.root / "manifest.json")["stages"]["iteration-1"] == {"generate": {"nodes": 40}}


def test_ledger_parts_are_in_prompt_order(run):
    for index in (10, 2, 0):
        tables.write_nodes(run.iteration(1) / "ledger" / f"part-{index:06d}-abc.parquet", [node("0")])
    assert [path.name for path in run.ledger_parts(1)] == [f"part-{index:06d}-abc.parquet" for index in (0, 2, 10)]
    assert run.ledger_parts(2) == []


def test_prompts_are_read_in_order(run):
    prompts = [prompt(str(index)) for index in range(5)]
    tables.write_prompts(run.prompts_path, prompts, group_size=2)
    assert list(run.prompts()) == prompts
