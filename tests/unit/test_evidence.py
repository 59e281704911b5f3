"""Check the discipline of evidence.py: test seeds are used once, and a difference must hold over scenes and runs."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import baseline
import evidence
import evidence_plots
import evidence_report
import evidence_tables
import seed_ledger

from csr_vlm.config.load import load_config
from csr_vlm.core.errors import CsrError
from csr_vlm.core.seeds import EVALUATION_SEEDS
from csr_vlm.evaluation.statistics import Metric, established, over_runs
from csr_vlm.world.coco import write_coco
from csr_vlm.world.scenes import HARBOUR, Split, check_for_evaluation
from tests.unit.builders import REQUIRED

ORIGIN = seed_ledger.Origin("evidence.py run", "abc1234", "a test")
NUM_SCENES = 40


def ledger_of(path: Path, *seeds: int, tables: tuple[str, ...] = ()) -> Path:
    known = [{"path": table, "results": "", "date": "2026-01-01", "rerun": False} for table in tables]
    path.write_text(json.dumps({"seeds": [{"seed": s, "purpose": "old", "tables": known} for s in seeds]}))
    return path


def scenes(events: int, number: int = NUM_SCENES) -> dict[str, dict[str, tuple[float, float]]]:
    """Give every metric an event in the first of the scenes."""
    return {f"scene-{i}": {name: (float(i < events), 1.0) for name in evidence_report.COLUMNS} for i in range(number)}


def write_run(job: evidence.Job, out: Path, events: Callable[[int], int], seed: int) -> None:
    """Write what a finished job leaves, with made-up tallies."""
    root = evidence.directory_of(job, out)
    for iteration in job.measured:
        tallies = scenes(events(iteration))
        document = {
            "protocol": {"seed": seed},
            "rows": [{"id": name, "text": "There is a boat.", "tallies": row} for name, row in tallies.items()],
        }
        for temperature in (0, 1):
            path = root / f"iteration-{iteration}" / "eval" / f"world-{temperature}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(document))
    (root / "result.json").write_text(json.dumps({"seconds": [1.0] * 4, "commit": "abc1234"}))


def main_jobs(*seeds: int) -> list[evidence.Job]:
    return [evidence.Job("calibrated", "main", seed=s, measured=(0, 3), sampled=(0, 3)) for s in seeds]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Return a results folder with a drawn seed and one finished run, CHAIR_S and all else 0.5 to 0.1."""
    ledger_of(tmp_path / "ledger.json", 1, 5)
    out = tmp_path / "out"
    seed = seed_ledger.prepare(out, tmp_path / "ledger.json", ORIGIN)
    write_run(main_jobs(0)[0], out, lambda iteration: 4 if iteration else 20, seed)
    return out


def write_tables(out: Path, to: str = "tables", *, seeds: tuple[int, ...] = (0,), rerun: bool = False) -> str:
    folder = out.parent / to
    evidence_report.write(main_jobs(*seeds), out, folder, rerun=rerun, ledger=out.parent / "ledger.json")
    return (folder / "README.md").read_text()


def test_the_plot_has_the_base_model_and_intervals_and_says_where_axes_start(results: Path) -> None:
    text = write_tables(results)
    assert "Bars: 95 % intervals over scenes, since there is one seed." in text
    assert (results.parent / "tables" / "main.png").read_bytes().startswith(b"\x89PNG")
    metric = {"chair_s": Metric(0.4, 0.3, 0.5, 9), "recall": Metric(0.99, 0.98, 1.0, 9)}
    evidence_plots.draw(
        results / "plot.svg", ("chair_s", "recall"), [evidence_plots.Line("mean", [(0, metric)])], "x", base=metric
    )
    drawn = (results / "plot.svg").read_text()
    for words in ("base model", "mean", "↓ lower is better", "↑ higher is better, axis does not start at 0"):
        assert f"<!-- {words} -->" in drawn or words in drawn, words
    assert drawn.count("LineCollection") == 2, "an interval in each panel"


# Seeds of the two splits


def test_no_seed_is_both_a_development_and_a_test_seed():
    assert not set(EVALUATION_SEEDS["development"]) & set(EVALUATION_SEEDS["test"])


@pytest.mark.parametrize(("split", "seed"), [(Split.TEST, 10_000), (Split.DEVELOPMENT, 9_999), (Split.CORPUS, 1)])
def test_a_seed_of_another_split_is_refused(split, seed, tmp_path):
    with pytest.raises(CsrError, match=r"is not a (test|development) seed|are not for evaluation"):
        check_for_evaluation(split, seed)
    with pytest.raises(CsrError):
        write_coco(HARBOUR, split, seed, 2, tmp_path)
    check_for_evaluation(Split.TEST, 9_999)
    check_for_evaluation(Split.DEVELOPMENT, 10_000)


@pytest.mark.parametrize(("split", "seed"), [("test", 10_001), ("development", 1)])
def test_the_configuration_refuses_a_seed_of_the_other_split(split, seed):
    with pytest.raises(CsrError, match=f"{seed} is not a {split} seed; expected"):
        load_config(None, [f"evaluation.world={{split: {split}, seed: {seed}}}"], base=REQUIRED)


def test_each_split_has_a_default_seed_of_its_own():
    for split, seeds in EVALUATION_SEEDS.items():
        config = load_config(None, [f"evaluation.world.split={split}"], base=REQUIRED)
        assert config.evaluation.world is not None
        assert config.evaluation.world.seed in seeds


# The ledger


def test_only_a_seed_that_was_never_used_is_drawn(tmp_path):
    *used, left = EVALUATION_SEEDS["test"]
    ledger = ledger_of(tmp_path / "ledger.json", *used)
    assert seed_ledger.draw(ledger, ORIGIN) == left
    entry = seed_ledger.entries(ledger)[-1]
    assert {name: entry[name] for name in ("seed", "command", "commit", "purpose", "tables")} == {
        "seed": left,
        "command": "evidence.py run",
        "commit": "abc1234",
        "purpose": "a test",
        "tables": [],
    }
    assert entry["date"].startswith("20")
    with pytest.raises(CsrError, match="every test seed has been used"):
        seed_ledger.draw(ledger, ORIGIN)


def test_the_seed_is_recorded_before_the_first_job(tmp_path, monkeypatch):
    ledger = ledger_of(tmp_path / "ledger.json", 1)
    seen = []
    monkeypatch.setattr(seed_ledger, "LEDGER", ledger)
    monkeypatch.setattr(evidence, "run_jobs", lambda *_: seen.append(len(seed_ledger.entries(ledger))))
    for _ in range(2):  # the second call goes on with the seed of the first
        evidence.run_all(tmp_path / "out", 1, "questions", "a test", None)
    assert seen == [2, 2]
    assert seed_ledger.seed_of(tmp_path / "out") in EVALUATION_SEEDS["test"]
    evidence.run_all(tmp_path / "development", 1, "ablations", "a test", None)
    assert len(seed_ledger.entries(ledger)) == 2, "jobs on development scenes need no test seed"


def test_a_job_on_test_scenes_without_a_drawn_seed_is_refused(tmp_path):
    with pytest.raises(CsrError, match="has no test seed"):
        evidence.run_job(evidence.job_of("comparisons/paper/0"), tmp_path)


def test_a_table_of_a_used_seed_is_refused_and_a_rerun_says_so(results):
    first = write_tables(results)
    seed = seed_ledger.seed_of(results)
    assert f"Test scenes are those of seed {seed}." in first
    assert "Rerun" not in first
    assert write_tables(results) == first, "the same table of the same results is not another use"
    with pytest.raises(CsrError, match=rf"test seed {seed} was used by tables/README\.md"):
        write_tables(results, "elsewhere")
    write_run(main_jobs(0)[0], results, lambda iteration: 2 if iteration else 20, seed)
    with pytest.raises(CsrError, match="not a test of new settings"):
        write_tables(results)
    assert "**Rerun**" in write_tables(results, rerun=True)
    entry = next(known for known in seed_ledger.entries(results.parent / "ledger.json") if known["seed"] == seed)
    assert [table["rerun"] for table in entry["tables"]] == [False, True]


def test_a_reported_folder_is_not_run_again_on_the_same_scenes(results):
    ledger = results.parent / "ledger.json"
    write_tables(results)
    with pytest.raises(CsrError, match=r"has been reported in tables/README\.md"):
        seed_ledger.prepare(results, ledger, ORIGIN)
    seed = seed_ledger.seed_of(results)
    assert seed_ledger.prepare(results, ledger, ORIGIN, rerun=seed) == seed


def test_an_old_seed_is_only_reported_as_a_rerun(tmp_path):
    ledger, out = ledger_of(tmp_path / "ledger.json", 5, tables=("docs/old.md",)), tmp_path / "out"
    seed_ledger.prepare(out, ledger, ORIGIN, rerun=5)
    write_run(main_jobs(0)[0], out, lambda iteration: 4, 5)
    with pytest.raises(CsrError, match=r"test seed 5 was used by docs/old\.md"):
        write_tables(out)
    assert "were used before (docs/old.md)" in write_tables(out, rerun=True)
    with pytest.raises(CsrError, match="test seed 6 is not in"):
        seed_ledger.prepare(out, ledger, ORIGIN, rerun=6)


def test_results_on_other_scenes_than_the_drawn_ones_are_refused(results):
    write_run(main_jobs(0)[0], results, lambda iteration: 4, 5)
    with pytest.raises(CsrError, match="was measured on test seed 5"):
        write_tables(results)


def test_the_ledger_that_ships_lists_every_old_seed():
    known = {entry["seed"]: entry for entry in seed_ledger.entries(seed_ledger.LEDGER)}
    assert {1, 5} <= set(known) <= set(EVALUATION_SEEDS["test"])
    assert known[5]["tables"]
    assert all({"date", "command", "commit", "purpose", "tables"} <= set(entry) for entry in known.values())


# Intervals over runs


def test_one_seed_has_no_interval_and_establishes_nothing(results):
    rows = [line for line in write_tables(results).splitlines() if line.startswith("| CHAIR_S")]
    assert len(rows) == 2
    for row in rows:
        assert "| 1 seed, no interval over runs |" in row
        assert row.endswith("| no |")
    assert evidence_tables.seeds_cell(4, evidence_tables.seeds_needed("main")) == "4 seeds of 5"
    assert evidence_tables.seeds_cell(3, evidence_tables.seeds_needed("ablations")) == "3"


def test_five_seeds_that_agree_establish_a_difference(results):
    seed = seed_ledger.seed_of(results)
    for job in main_jobs(1, 2, 3, 4):
        write_run(job, results, lambda iteration, extra=job.seed % 2: 4 + extra if iteration else 20, seed)
    row = next(
        line for line in write_tables(results, seeds=(0, 1, 2, 3, 4)).splitlines() if line.startswith("| CHAIR_S")
    )
    assert "| 5 |" in row
    assert row.endswith("| yes |")


def runs_of(*events: int, number: int = NUM_SCENES) -> dict[int, Any]:
    return {seed: scenes(count, number) for seed, count in enumerate(events)}


def is_established(before: Mapping[int, Any], after: Mapping[int, Any]) -> tuple[bool, bool, bool]:
    """Return whether the interval over scenes excludes 0, that over runs, and the verdict."""
    over_scenes, over = evidence_tables.difference(before, after, "chair_s")
    excludes = [m.low is not None and m.high is not None and not m.low <= 0 <= m.high for m in (over_scenes, over)]
    return excludes[0], excludes[1], established(over_scenes, over)


def test_a_difference_is_established_only_if_both_intervals_exclude_0():
    assert is_established(runs_of(20, 20, 20), runs_of(4, 5, 6)) == (True, True, True)
    # The scenes agree, and the runs do not: differences -0.5, -0.375, 0.
    assert is_established(runs_of(20, 20, 20), runs_of(0, 5, 20)) == (True, False, False)
    # The runs agree, and five scenes do not suffice.
    assert is_established(runs_of(3, 3, 3, number=5), runs_of(2, 2, 2, number=5)) == (False, True, False)
    assert is_established(runs_of(20), runs_of(4)) == (True, False, False)
    up, down = Metric(1.0, 0.5, 1.5, 9), Metric(-1.0, -1.5, -0.5, 3)
    assert established(up, up)
    assert not established(up, down)
    assert not established(up, Metric(1.0, None, None, 1))


def test_runs_are_paired_by_seed():
    before = {0: scenes(0), 1: scenes(20), 2: scenes(30)}
    after = {3: scenes(40), 2: scenes(20), 1: scenes(12)}
    over_scenes, over = evidence_tables.difference(before, after, "chair_s")
    # Seed 1: 12/40 - 20/40; seed 2: 20/40 - 30/40; t(0.975, 1) = 12.706, half-width 12.706 * 0.025.
    assert over.value == pytest.approx((-0.2 - 0.25) / 2)
    assert over.n == 2
    assert over.high == pytest.approx(-0.225 + 12.706 * 0.025, abs=1e-4)
    assert over_scenes.value == pytest.approx(-0.225)
    _, none = evidence_tables.difference(before, {7: scenes(1)}, "chair_s")
    assert none.value is None


def test_student_t_over_runs():
    found = over_runs([0.1, 0.2, 0.3, 0.4, 0.5])
    # sd 0.15811, t(0.975, 4) = 2.7764: 0.3 -+ 2.7764 * 0.15811 / sqrt(5)
    assert (found.value, found.n) == (pytest.approx(0.3), 5)
    assert (found.low, found.high) == (pytest.approx(0.10368, abs=1e-4), pytest.approx(0.49632, abs=1e-4))
    assert over_runs([0.3]) == Metric(0.3, None, None, 1)
    # Runs that agree: the variance of rounding to steps of 0.1, 0.01 / 12; t(0.975, 2) = 4.3027.
    assert over_runs([0.3, 0.3, 0.3], step=0.1).high == pytest.approx(0.3 + 4.3027 * (0.01 / 36) ** 0.5, abs=1e-4)
    assert over_runs([0.3, 0.3, 0.3]) == Metric(pytest.approx(0.3), None, None, 3)
    assert over_runs([]) == Metric(None, None, None, 0)


def test_a_cell_marks_established_differences_and_single_seeds():
    reference = runs_of(20, 20, 20)
    assert evidence_tables.cell(runs_of(4, 5, 6), "chair_s", reference).startswith("0.125* (")
    assert evidence_tables.cell(runs_of(0, 5, 20), "chair_s", reference).startswith("0.208 (")
    assert evidence_tables.cell(runs_of(4), "chair_s", reference).endswith("; 1 seed)")
    assert evidence_tables.cell(runs_of(4, 5, 6), "not_measured", reference) == "-"


# The jobs


def test_every_row_has_its_seeds():
    seeds = Counter((job.group, job.name) for job in evidence.JOBS)
    for (group, name), number in seeds.items():
        assert number >= evidence_tables.seeds_needed(group), name
    assert len({job.key for job in evidence.JOBS}) == len(evidence.JOBS)


def test_the_baseline_runs_every_preset_through_the_same_jobs(tmp_path, capsys):
    jobs = evidence.baseline_jobs("prose")
    assert len(jobs) == 3 * len(baseline.PRESETS)
    assert {(job.world, job.split, job.iterations) for job in jobs} == {("prose", "development", 3)}
    assert evidence.job_of(jobs[4].key) == jobs[4]
    for job in jobs:
        load_config(None, job.overrides.split(), base=REQUIRED)
    assert not list(evidence.pending(evidence.baseline_jobs("nowhere"), tmp_path))
    assert "this version has no world 'nowhere'" in capsys.readouterr().err


def test_the_profiles_of_the_baseline_are_measured_once(tmp_path, monkeypatch):
    import profiles

    folder = tmp_path / "profiles"
    folder.mkdir()
    (folder / "noise.yaml").write_bytes((profiles.PROFILES / "noise.yaml").read_bytes())
    monkeypatch.setattr(profiles, "PROFILES", folder)
    monkeypatch.setattr(baseline, "PRESETS", {"calibrated": "", "random_pairs": "preset=random_pairs"})
    rows = baseline.measure_profiles(tmp_path, "abc1234", num_pictures=3)
    assert [(row["preset"], row["seed"]) for row in rows] == [
        (preset, seed) for seed in range(3) for preset in ("calibrated", "random_pairs")
    ]
    monkeypatch.setattr(profiles, "run_profile", None)  # a second call would fail if it measured anything
    assert baseline.measure_profiles(tmp_path, "later", num_pictures=3) == json.loads(json.dumps(rows))
    evidence_report.write_baseline(rows, [], tmp_path / "out", tmp_path / "to")
    text = (tmp_path / "to" / "baseline.md").read_text()
    assert "3 pictures for each profile and seed, 3 seeds" in text
    right, wrong = (sum(row[side] for row in rows if row["preset"] == "calibrated") for side in ("right", "wrong"))
    assert f"| noise | 3 | {right} : {wrong} |" in text
    evidence_report.write_baseline(rows[:2], [], tmp_path / "out", tmp_path / "one")
    assert "| noise | 1 seed, no interval over runs |" in (tmp_path / "one" / "baseline.md").read_text()
