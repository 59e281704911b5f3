"""Test how lmms-eval's results are read and which are refused. lmms-eval itself is not needed."""

from __future__ import annotations

import sys
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest

from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation import lmms
from csr_vlm.evaluation.lmms import BENCHMARKS, benchmark_protocol, merge_documents, read_results, select_benchmarks
from csr_vlm.evaluation.reproduction import published


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that lmms-eval 0.7.3 is installed and that no judge has a key."""
    for variable in ("OPENAI_API_KEY", "AZURE_API_KEY", "API_TYPE", "MODEL_VERSION"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(metadata, "version", lambda name: "0.7.3")
    monkeypatch.setattr(lmms, "is_installed", lambda name: True)


def results(task: str, numbers: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "results": {task: {"alias": task, **{f"{name},none": value for name, value in numbers.items()}}},
        "samples": {task: [{"doc_id": at, "filtered_resps": [["yes"]]} | sample for at, sample in enumerate(samples)]},
        "versions": {task: 0.0},
    }


def read(name: str, found: dict[str, Any], unanswered: int = 0, limit: int | None = None) -> dict[str, Any]:
    task = BENCHMARKS[name].task
    return read_results(found, {name: BENCHMARKS[name]}, {task: unanswered}, {task: 16}, limit)


def test_every_published_benchmark_of_lmms_eval_is_measured():
    measured = {metric.name for benchmark in BENCHMARKS.values() for metric in benchmark.metrics}
    sources = [source for benchmark in published().benchmarks.values() for source in benchmark.sources]
    named = {name for evaluation, name, _ in sources if evaluation == "lmms"}
    assert measured == named - {"seed", "vizwiz"}, "the names that version 0.1 gave to SEED's images and to VizWiz"


def test_a_mean_over_questions_gets_an_interval_and_rows():
    samples = [{"exact_match": 1.0}, {"exact_match": 0.0}, {"exact_match": 1.0}, {"exact_match": 1.0}]
    found = read("gqa", results("gqa", {"exact_match": 0.75}, samples))
    metric = found["metrics"]["gqa"]
    assert (metric["value"], metric["n"]) == (0.75, 4)
    assert metric["low"] < 0.75 < metric["high"]
    assert [row["tallies"] for row in found["rows"]] == [{"gqa": (value["exact_match"], 1.0)} for value in samples]
    assert [row["id"] for row in found["rows"]] == ["gqa/0", "gqa/1", "gqa/2", "gqa/3"]
    assert found["rows"][0]["text"] == "yes"


def test_a_metric_that_is_not_a_mean_over_questions_gets_no_interval():
    samples = [{"mme_perception_score": {"score": 1.0}}, {"mme_cognition_score": {"score": 0.0}}]
    scores = {"mme_perception_score": 1510.7, "mme_cognition_score": 348.2}
    found = read("mme", results("mme", scores, samples))
    assert found["metrics"]["mme_p"] == {"value": 1510.7, "low": None, "high": None, "n": 1}, "one of two questions"
    other = read("gqa", results("gqa", {"exact_match": 0.9}, [{"exact_match": 1.0}, {"exact_match": 0.0}]))
    assert other["metrics"]["gqa"]["low"] is None, "0.9 is not the mean of 1 and 0: no interval of another number"


def test_the_protocol_records_the_task_and_its_settings():
    found = read("gqa", results("gqa", {"exact_match": 1.0}, [{"exact_match": 1.0}]), limit=1)
    protocol = found["protocol"]["gqa"]
    assert protocol["task"] == "gqa"
    assert protocol["lmms_eval"] == "0.7.3"
    assert protocol["max_new_tokens"] == 16
    assert protocol["limit"] == "the first 1 questions only"
    assert benchmark_protocol(found, "gqa") == protocol
    assert benchmark_protocol(found, "mme_p") == {}


def test_a_missing_metric_is_refused():
    with pytest.raises(CsrError, match="returned no exact_match"):
        read("gqa", results("gqa", {"other": 1.0}, [{}]))


def test_unanswered_questions_are_refused_where_the_metric_includes_them():
    found = results("gqa", {"exact_match": 0.0}, [{"exact_match": 0.0}])
    with pytest.raises(CsrError, match="1 questions do not have exactly one image"):
        read("gqa", found, unanswered=1)
    samples = [
        {"seed_image": {"pred": pred, "answer": "B"}, "seed_all": {"pred": pred, "answer": "B"}} for pred in ("b", "A")
    ]
    video = {"seed_video": {"pred": "", "answer": "C"}, "seed_all": {"pred": "", "answer": "C"}}
    numbers = {"seed_image": 0.5, "seed_all": 0.33}
    seed = read("seed", results("seedbench", numbers, [*samples, video]), unanswered=1)
    metric = seed["metrics"]["seed_image"]
    assert (metric["value"], metric["n"]) == (0.5, 2), "the images' own number leaves videos out"
    assert metric["low"] < 0.5 < metric["high"]
    assert [row["tallies"] for row in seed["rows"]] == [{"seed_image": (1.0, 1.0)}, {"seed_image": (0.0, 1.0)}, {}]
    assert "seed" not in seed["metrics"], "the paper's SEED has videos: another key"
    assert seed["protocol"]["seed"]["left_out"] == 1


@pytest.mark.parametrize("name", ["llava_w", "mm_vet"])
def test_a_judge_needs_its_key(name, monkeypatch):
    with pytest.raises(CsrError, match="OPENAI_API_KEY is not set"):
        select_benchmarks([name], None)
    monkeypatch.setenv("API_TYPE", "azure")
    with pytest.raises(CsrError, match="AZURE_API_KEY is not set"):
        select_benchmarks([name], None)
    monkeypatch.setenv("AZURE_API_KEY", "something")
    assert list(select_benchmarks([name], None)) == [name]


def test_a_failed_judge_is_refused():
    """lmms-eval counts a failed comparison as -1 against -1, which makes 100.0."""
    samples = [{"gpt_eval_llava_all": {"scores": [8, 7]}}, {"gpt_eval_llava_all": {"scores": [-1, -1]}}]
    with pytest.raises(CsrError, match="the judge failed on 1 answers"):
        read("llava_w", results("llava_in_the_wild", {"gpt_eval_llava_all": 100.0}, samples))
    fine = read("llava_w", results("llava_in_the_wild", {"gpt_eval_llava_all": 87.5}, samples[:1]))
    assert fine["metrics"]["llava_w"]["value"] == 87.5
    assert fine["protocol"]["llava_w"]["judge"] == "not stated"


def test_judged_questions_get_intervals_and_the_judges_name():
    pairs = [{"gpt_eval_llava_all": {"scores": [8, 7], "eval_model": "gpt-x"}}] * 2 + [
        {"gpt_eval_llava_all": {"scores": [9, 3], "eval_model": "gpt-x"}}
    ]
    found = read("llava_w", results("llava_in_the_wild", {"gpt_eval_llava_all": 68.0}, pairs))
    metric = found["metrics"]["llava_w"]  # 17 of 25 points
    assert (metric["value"], metric["n"]) == (68.0, 3)
    assert metric["low"] < 68.0 < metric["high"]
    assert found["protocol"]["llava_w"]["judge"] == "gpt-x"
    scores = [{"gpt_eval_score": {"score": score, "eval_model": "gpt-y-2026"}} for score in (1.0, 0.5, 0.0)]
    vet = read("mm_vet", results("mmvet", {"gpt_eval_score": 50.0}, scores))
    assert vet["metrics"]["mm_vet"]["low"] < 50.0 < vet["metrics"]["mm_vet"]["high"]
    assert vet["protocol"]["mm_vet"]["judge"] == "gpt-y-2026"
    assert "step by step" in vet["protocol"]["mm_vet"]["note"]


def test_answers_to_which_a_judge_gives_no_score_are_noticed(monkeypatch):
    """lmms-eval logs them and counts 0; the stand-in has the two functions of loguru that are used."""
    sinks: dict[int, Any] = {}

    def add(sink: Any, **_: Any) -> int:
        sinks[len(sinks)] = sink
        return len(sinks) - 1

    logger = SimpleNamespace(add=add, remove=sinks.pop)
    monkeypatch.setitem(sys.modules, "loguru", SimpleNamespace(logger=logger))
    with lmms.unscored_answers() as found:
        for line in ("Reach to max trials, v1_3 failed to get a score.", "Overall Score: 31.00"):
            sinks[0](line)
    assert len(found) == 1
    assert sinks == {}, "nothing is left behind"


def test_an_answer_without_a_score_is_refused():
    """lmms-eval scores an answer as 0, with an empty judge name, where MM-Vet's judge gave no score."""
    samples = [{"gpt_eval_score": {"score": 0.0, "eval_model": judge}} for judge in ("gpt", "")]
    with pytest.raises(CsrError, match="the judge failed on 1 answers"):
        read("mm_vet", results("mmvet", {"gpt_eval_score": 0.0}, samples))
    fine = read("mm_vet", results("mmvet", {"gpt_eval_score": 0.0}, samples[:1]))
    assert fine["metrics"]["mm_vet"]["value"] == 0.0, "a zero given by the judge is kept"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pope", "compares strings"),
        ("mmbench_en_dev", "guesses letters"),
        ("mmbench_cn", "guesses letters"),
        ("gqq", "'gqq' is not a valid benchmark"),
    ],
)
def test_untrustworthy_and_unknown_tasks_are_refused(name, message):
    with pytest.raises(CsrError, match=message):
        select_benchmarks([name], None)


def test_a_missing_lmms_eval_is_reported(monkeypatch):
    monkeypatch.setattr(lmms, "is_installed", lambda name: False)
    with pytest.raises(CsrError, match="not installed"):
        select_benchmarks(["gqa"], None)


def test_new_benchmarks_are_merged_with_stored_ones():
    old = read("gqa", results("gqa", {"exact_match": 1.0}, [{"exact_match": 1.0}]))
    new = read("sqa", results("scienceqa_img", {"exact_match": 0.0}, [{"exact_match": 0.0}]))
    both = merge_documents(old, new)
    assert set(both["metrics"]) == set(both["protocol"]) == {"gqa", "sqa"}
    assert [row["id"] for row in both["rows"]] == ["gqa/0", "sqa/0"]
    again = merge_documents(both, read("gqa", results("gqa", {"exact_match": 0.0}, [{"exact_match": 0.0}])))
    assert again["metrics"]["gqa"]["value"] == 0.0
    assert sorted(row["id"] for row in again["rows"]) == ["gqa/0", "sqa/0"]
    assert merge_documents(None, old) == old
