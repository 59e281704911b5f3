"""Test the whole loop: its results, and that kills do not change them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from csr_vlm.config.load import resolve
from csr_vlm.config.schema import RunConfig
from csr_vlm.core.progress import Silent
from csr_vlm.core.records import EARLIER_COLUMN
from csr_vlm.method.claim_evidence import thing_of
from csr_vlm.pipeline.loop import align
from csr_vlm.store import tables
from csr_vlm.store.progress_file import read_progress
from csr_vlm.store.run import Run
from tests.integration.conftest import small_config
from tests.processes import CSR, Fork, csr, results, zygote


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return small_config(tmp_path_factory.mktemp("world"), evaluation={"world": {"num_scenes": 20}})


@pytest.fixture(scope="module")
def undisturbed(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run.create(tmp_path_factory.mktemp("undisturbed"), config)
    csr("run", run.root, "--quiet")
    return run


def test_a_run_leaves_what_the_design_promises(undisturbed: Run) -> None:
    names = results(undisturbed.root)
    assert sum("ledger/part-" in name for name in names) == 2 * 4
    for iteration in (1, 2):
        assert f"iteration-{iteration}/pairs.parquet" in names
        assert f"iteration-{iteration}/questions.parquet" in names
        assert f"iteration-{iteration}/adapter/adapter_model.safetensors" in names
        assert undisturbed.result(iteration, "train")["reference"] == "ledger"
    assert names["adapter/adapter_model.safetensors"] == names["iteration-2/adapter/adapter_model.safetensors"]
    assert names["iteration-1/adapter/adapter_model.safetensors"] != names["adapter/adapter_model.safetensors"]
    manifest = json.loads((undisturbed.root / "manifest.json").read_text())
    assert manifest["seed"] == 0
    assert manifest["stages"]["iteration-1"]["generate"]["nodes"] > 0
    assert manifest["stages"]["iteration-0"]["prompts"] == {
        "accepted": 16,
        "dropped": {},
        "examples": [],
        "sha256": manifest["stages"]["iteration-0"]["prompts"]["sha256"],
        "preset": manifest["preset"],
        "heldout": 2,
    }
    trained_on = {prompt.prompt_id for prompt in undisturbed.prompts()}
    assert (len(trained_on), undisturbed.num_prompts) == (14, 14)
    assert not trained_on & {prompt.prompt_id for prompt in undisturbed.heldout()}
    assert (undisturbed.root / "report.html").stat().st_size > 10_000
    assert read_progress(undisturbed.root).state == "done"
    leftovers = [p for p in undisturbed.root.rglob("*") if p.suffix in (".tmp", ".pkl", ".bin", ".pt")]
    assert leftovers == []


def test_the_evaluation_has_intervals_protocol_and_every_iteration(undisturbed: Run) -> None:
    for iteration in range(3):
        found = json.loads(undisturbed.evaluation_path(iteration, "world").read_text())
        assert found["protocol"]["split"] == "test"
        assert found["protocol"]["decoding"] == "greedy"
        assert len(found["rows"]) == found["metrics"]["chair_s"]["n"] == 20
        recall = found["metrics"]["recall"]
        assert recall["low"] <= recall["value"] <= recall["high"]


def test_pairs_derive_from_the_ledger_alone(undisturbed: Run) -> None:
    pairs = list(tables.read_pairs(undisturbed.pairs_path(1)))
    nodes = {
        (node.prompt_id, node.node_id): node for part in undisturbed.ledger_parts(1) for node in tables.read_nodes(part)
    }
    for pair in pairs:
        assert pair.chosen.reward > pair.rejected.reward
        leaf = nodes[pair.prompt.prompt_id, pair.chosen.node_id]
        assert pair.chosen.token_ids[-len(leaf.token_ids) :] == leaf.token_ids


def test_the_second_ledger_counts_what_the_first_one_claimed(undisturbed: Run) -> None:
    made: Counter[tuple[str, str]] = Counter()
    for part in undisturbed.ledger_parts(1):
        for node in tables.read_nodes(part):
            assert not any(EARLIER_COLUMN in row for row in node.claims.values())
            made.update((node.prompt_id, thing) for thing in {thing_of(claim) for claim in node.claims})
    found = {
        (node.prompt_id, thing_of(claim)): row[EARLIER_COLUMN]
        for part in undisturbed.ledger_parts(2)
        for node in tables.read_nodes(part)
        for claim, row in node.claims.items()
    }
    assert any(found.values())
    assert found == {key: made[key] for key in found}


def test_running_a_finished_run_again_changes_nothing(undisturbed: Run) -> None:
    before = results(undisturbed.root)
    align(undisturbed, Silent())
    assert results(undisturbed.root) == before


def test_a_second_seed_gives_another_ledger(undisturbed: Run, config: RunConfig, tmp_path: Path) -> None:
    run = Run.create(tmp_path, config.model_copy(update={"seed": 1, "iterations": 1}))
    align(run, Silent())
    assert results(run.root)["iteration-1/pairs.parquet"] != results(undisturbed.root)["iteration-1/pairs.parquet"]


def start(run: Run) -> Fork:
    return zygote().start(["run", str(run.root), "--quiet"])


def kill_when(run: Run, condition: Callable[[], bool]) -> None:
    """Start the run and send SIGKILL the instant the condition holds."""
    process = start(run)
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_six_kills_do_not_change_the_result(undisturbed: Run, config: RunConfig, tmp_path: Path) -> None:
    run = Run.create(tmp_path, config)
    rng = random.Random(0)

    def after(condition: Callable[[], bool]) -> Callable[[], bool]:
        """Hold some milliseconds after the condition first holds: anywhere inside the work that follows."""
        due: list[float] = []

        def later() -> bool:
            if not due and condition():
                due.append(time.perf_counter() + rng.uniform(0.0, 0.3))
            return bool(due) and time.perf_counter() >= due[0]

        return later

    moments = [
        lambda: run.is_done(0, "prompts"),
        lambda: len(run.ledger_parts(1)) >= 2,
        lambda: any(run.question_parts(1).glob("part-*.parquet")),
        lambda: run.is_done(1, "pairs") and (run.iteration(1) / "trainer").exists(),
        lambda: run.is_done(1, "train"),
        lambda: len(run.ledger_parts(2)) >= 1,
    ]
    for moment in moments:
        kill_when(run, after(moment))
    assert not run.is_done(2, "train")
    assert start(run).wait() == 0
    assert results(run.root) == results(undisturbed.root)
    assert not list(run.root.rglob("*.tmp"))


def test_two_processes_cannot_share_a_run(config: RunConfig, tmp_path: Path) -> None:
    run = Run.create(tmp_path, config)
    with run.locked():
        second = subprocess.run([*CSR, "run", str(run.root)], capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "is in use by another process" in second.stderr
    assert "Traceback" not in second.stderr


def test_the_final_adapter_loads_on_the_original_base(undisturbed: Run) -> None:
    settings = json.loads((undisturbed.root / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == undisturbed.config.model.path
    assert settings["r"] == undisturbed.config.training.lora.r
    weights = load_file(undisturbed.root / "adapter" / "adapter_model.safetensors")
    assert all("language_model" in name for name in weights)


def test_bad_prompts_are_counted_named_and_survived(config: RunConfig, tmp_path: Path) -> None:
    source = Path(config.data.prompts)
    rows = [json.loads(line) for line in source.read_text().splitlines()[:6]]
    (source.parent / "images" / "broken.png").write_bytes(b"\x89PNG not really")
    rows[1]["image"] = "images/broken.png"
    rows[2]["image"] = "images/missing.png"
    rows[3] = rows[0]
    broken = source.parent / "broken.jsonl"
    broken.write_text("\n".join(json.dumps(row) for row in rows) + "\nnot json\n")
    data = config.data.model_copy(update={"prompts": str(broken)})
    run = Run.create(tmp_path, config.model_copy(update={"data": data, "iterations": 1}))
    align(run, Silent())
    found = run.result(0, "prompts")
    assert found["accepted"] == 3
    assert found["dropped"] == {"not an image": 1, "missing": 1, "duplicate id": 1, "not a JSON object": 1}
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]["prompts"] == str(broken)


def test_a_run_stops_at_its_own_rule(config: RunConfig, tmp_path: Path) -> None:
    """The rule holds for any change but a large fall of length, so iteration 1 is the last."""
    settings = config.dump()
    settings["evaluation"] |= {"stop_if": ["words > -100"]}
    run = Run.create(tmp_path, resolve(settings))
    align(run, Silent())
    assert run.iterations_done("train") == [1], "iteration 2 never began"
    assert run.stopped_at == 1
    assert not (tmp_path / "adapter").exists()
    assert "The run stopped after iteration 1 and returned the base model" in (tmp_path / "report.html").read_text()
