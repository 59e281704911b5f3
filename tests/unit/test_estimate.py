"""Check estimates against numbers worked out by hand."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from csr_vlm.cli.check import time_span
from csr_vlm.config.load import load_config, resolve
from csr_vlm.config.schema import SearchConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Silent
from csr_vlm.core.records import Prompt
from csr_vlm.generation.row_budget import RowShape, row_budget
from csr_vlm.models.architecture import Architecture, published_architecture, read_architecture, scorer_shape
from csr_vlm.pipeline import assumptions
from csr_vlm.pipeline.advice import faster, fitting_rows
from csr_vlm.pipeline.assumptions import ASSUMPTIONS, Case, cases
from csr_vlm.pipeline.estimate import Range, estimate
from csr_vlm.pipeline.hardware import GPUS, Hardware, known_gpu, parse_gpu
from csr_vlm.pipeline.live_rows import SearchShape, simulate
from csr_vlm.pipeline.measured import last_comparable_run
from csr_vlm.pipeline.memory_costs import memory_bytes
from csr_vlm.pipeline.prompt_lengths import prompt_lengths
from csr_vlm.pipeline.stage_costs import STAGES, StageCosts
from csr_vlm.store.run import Run
from csr_vlm.store.tables import write_prompts

ROOT = Path(__file__).parents[2]
SMALL = Architecture(
    "llava", layers=2, width=8, intermediate=16, heads=2, kv_heads=1, head_width=4, vocabulary=100, tied=False,
    context=512, vision_parameters=1000, vision_tokens=10, image_tokens=5, max_image_tokens=5,
)  # fmt: skip
GPU = Hardware("toy", flops=1e9, float32_flops=1e14, bandwidth=1e6, memory=1e10)


def config(**changes: object):
    base = {
        "model": {"path": "org/toy-1m"},
        "scorer": {"path": "org/clip"},
        "data": {"prompts": "prompts.jsonl"},
        "generation": {"max_rows": 8, "prompts_per_part": 4},
        "evaluation": {"heldout": 0},
    }
    return resolve({**base, **changes})


def likely() -> Case:
    return list(cases())[1]


def costs(changes: dict | None = None, **fields: object) -> StageCosts:
    made = StageCosts(
        config(**(changes or {})), SMALL, GPU, likely(), 8, prompt_tokens=20, image_tokens=5, longest_prompt=30
    )
    return replace(made, **fields)


def test_parameters_of_a_small_model():
    # A layer: queries and output 8 x 8 each, keys and values 8 x 4 each, three maps of 8 x 16.
    layer = 2 * 64 + 2 * 32 + 3 * 128
    assert SMALL.layer_parameters == 2 * layer
    assert SMALL.parameters == 2 * layer + 2 * 800 + 1000
    assert replace(SMALL, tied=True).parameters == 2 * layer + 800 + 1000
    # Rank 3: inputs and outputs of q (8, 8), k and v (8, 4), o (8, 8), gate and up (8, 16), down (16, 8).
    assert SMALL.lora_parameters(3) == 3 * 2 * (16 + 2 * 12 + 16 + 2 * 24 + 24)
    assert SMALL.cache_bytes(2.0) == 2 * 2 * 4 * 2


def test_memory_of_published_models():
    qwen = published_architecture("Qwen/Qwen2.5-VL-7B-Instruct")
    # As measured: about 6.9 GB. 6.53e9 weights at 0.516 bytes, 1.09e9 of embeddings and head and 0.68e9 of vision at 2.
    assert qwen.weight_bytes(2.0, nf4=True) / 1e9 == pytest.approx(6.9, abs=0.05)
    llava = published_architecture("somewhere/llava-1.5-7b-hf")
    assert llava.weight_bytes(2.0, nf4=False) / 1e9 == pytest.approx(14.1, abs=0.05)
    assert llava.cache_bytes(2.0) == 2 * 32 * 32 * 128 * 2, "half a megabyte"
    assert llava.lora_parameters(128) == pytest.approx(319.8e6, rel=1e-3)
    assert published_architecture("org/unknown") is None


def test_a_search_is_simulated_row_by_row():
    # Two candidates of ten tokens; three rounds with beams of 1, 2 and 2.
    shape = SearchShape(2, 2, prompts=1, max_rows=8, max_prompts=1, sentences=(3, 3), tokens=(10, 10))
    one = simulate(shape)
    assert (one.steps, one.tokens, one.sentences, one.prompts) == (30, 20 + 40 + 40, 10, 1)
    narrow = simulate(replace(shape, max_rows=2))
    assert (narrow.steps, narrow.tokens) == (10 + 20 + 20, 100), "the groups of a round one after the other"
    two = simulate(replace(shape, prompts=2, max_prompts=2))
    assert (two.steps, two.rows) == (15, 100 / 15), "30 steps for both"


def test_eighty_rows_of_llava_keep_forty_busy():
    rows = simulate(SearchShape(5, 4, 16, 80, 4, sentences=(4, 8), tokens=(8, 35))).rows
    assert 38 < rows < 48


def test_a_step_takes_as_long_as_its_slower_side():
    case = replace(
        likely(), step_launches=100, adapter_launches=200, launch_microseconds=10, row_microseconds=5, prefill_share=0.5
    )
    made = costs(case=case)
    # Two layers launch 100 operations of 10 us each, and 4 rows take 5 us each.
    assert made.host_step_seconds(4, has_adapter=False) == pytest.approx(0.002 + 20e-6)
    assert made.host_step_seconds(4, has_adapter=True) == pytest.approx(0.004 + 20e-6)
    weights = (SMALL.layer_parameters + 800) * 2.0
    cached = made.rows.prompts * 20 + 4 / 4 * made.response_tokens / 2 + 4 * made.sentence_tokens / 2
    reading = (weights + cached * 32) / (1e6 * case.bandwidth_share)
    assert made.gpu_step_seconds(4) == pytest.approx(reading), "2 * 4 * 1952 operations take 0.03 ms"
    assert made.step_seconds(4, has_adapter=True) == max(reading, 0.004 + 20e-6)
    many = 10_000_000
    assert costs(case=replace(case, bandwidth_share=1e6)).gpu_step_seconds(many) == pytest.approx(
        2 * many * (SMALL.layer_parameters + 800) / (1e9 * 0.5)
    )


def test_prefill_claims_and_training_follow_from_arithmetic():
    case = replace(likely(), prefill_share=0.5, training_share=0.25, picture_milliseconds=0, with_pairs=0.5)
    made = costs({"training": {"trl": {"num_train_epochs": 2}}, "iterations": 1}, case=case)
    forward = 2 * SMALL.layer_parameters * 20 + 4 * 2 * 8 * 20**2
    picture = 2 * 1000 * 10
    assert made.prefill() == pytest.approx(8 * (forward + picture) / 0.5e9)
    lora = SMALL.lora_parameters(16)
    assert made.trees == 8 * 0.5 * 2
    operations = made.trained.tree_operations(made.tree.tokens, made.tree.targets, lora)
    assert made.training() == pytest.approx(8 * operations / 0.25e9)
    tree = made.tree.tokens
    forward = 2 * SMALL.layer_parameters * tree + 4 * 2 * 8 * tree**2
    assert made.reference() == pytest.approx(4 * (forward + picture) / 0.5e9)
    tokens = 20 + 4 * 20
    asked = 2 * SMALL.layer_parameters * tokens + 4 * 2 * 8 * tokens**2 + picture
    clip = scorer_shape("org/clip")
    scored = 2 * clip.vision_parameters * clip.vision_tokens + 64 * 2 * clip.text_parameters * 25
    assert made.claims() == pytest.approx(8 * (asked / 0.5e9 + scored / (1e14 * case.scorer_share)))
    assert costs({"method": {"pairs": {"questions": {"per_prompt": 0}}}}).claims() == 0


def test_one_process_checks_pictures_in_threads():
    case = replace(likely(), check_milliseconds=4, picture_milliseconds=16, check_threads=2)
    assert costs(case=case).checking() == pytest.approx(8 * 0.010)


def test_several_gpus_share_work_items_and_steps():
    one, many = costs(), costs(hardware=replace(GPU, count=2))
    assert many.prefill() == pytest.approx(one.prefill() / 2)
    assert costs(hardware=replace(GPU, count=8)).prefill() == pytest.approx(one.prefill() / 2), "there are two items"
    assert many.training() == pytest.approx(one.training() / (2 * likely().gpus_in_training))


def test_memory_of_the_search():
    made = costs(case=replace(likely(), overhead=1.0))
    # 8 rows: one prompt of up to 30 tokens, two groups of a path and 4 x 35 tokens, and 8 finished sentences.
    path = 8 * made.sentence_tokens
    tokens = 30 + 2 * (path + 4 * 35) + 8 * made.sentence_tokens
    usage = memory_bytes(made)
    weights, lora, scorer = 2 * SMALL.parameters, 4 * SMALL.lora_parameters(16), 4 * 428e6
    prefill = 8192 * (32 + 2 * (8 * 8 + 3 * 16))
    assert usage["claims"] == pytest.approx(weights + lora + scorer + prefill)
    assert usage["search"] == pytest.approx(usage["claims"] + 16 * 8 * 100 + tokens * 32)
    assert usage["training"] == pytest.approx(weights + 16 * SMALL.lora_parameters(16) + 8192 * 8 * 36 * 2)


def test_rows_follow_from_the_free_memory():
    # 16 rows: 2 prompts of 30 tokens, 4 groups of a path of 7 x 70 and 4 sentences of 70 tokens; 32 bytes a token.
    stored = (2 * 30 + 4 * (490 + 280)) * 32 + 16 * 16 * 100
    prefill = 8192 * (32 + 2 * (8 * 8 + 3 * 16))
    shape = RowShape.longest(SearchConfig())
    assert shape.row_bytes(16, 30, SMALL, 2.0) == stored
    assert row_budget((stored + prefill) / 0.9 + 1, shape, 30, SMALL, 2.0) == 16
    assert row_budget((stored + prefill) / 0.9 - 1, shape, 30, SMALL, 2.0) == 12
    assert row_budget(0, shape, 30, SMALL, 2.0) == 4, "one group decodes in any case"
    assert row_budget(1e12, shape, 30, SMALL, 2.0) == 1024


def test_a_plan_has_the_rows_that_the_engine_would_choose():
    auto = {"generation": {"max_rows": "auto", "prompts_per_part": 4}}
    loaded = 2 * SMALL.parameters + 4 * SMALL.lora_parameters(16) + 4 * 428e6
    planned = costs(auto, hardware=replace(GPU, memory=1e9 + loaded + 6e6))
    assert planned.max_rows == row_budget(6e6, RowShape.longest(SearchConfig()), 30, SMALL, 2.0)
    assert 4 < planned.max_rows < 1024
    assert replace(planned, hardware=replace(GPU, memory=1e9)).max_rows == 4
    assert replace(planned, hardware=replace(GPU, is_cpu=True)).max_rows == 512


def test_gpus_are_named_with_their_number():
    assert parse_gpu("H200:8") == replace(GPUS["h200"], count=8)
    assert known_gpu("NVIDIA A100-SXM4-80GB") == GPUS["a100-80"]
    assert known_gpu("NVIDIA A100-SXM4-40GB") is None
    for text, reason in (("h2000", "known GPU"), ("h200:0", "number"), ("h200:x", "number"), ("auto", "no GPU")):
        with pytest.raises(CsrError, match=reason):
            parse_gpu(text)


def test_every_assumption_is_ordered_from_cheap_to_costly():
    helpful = {"bandwidth_share", "prefill_share", "training_share", "nf4_share", "scorer_share", "gpus_in_training"}
    helpful |= {"check_threads", "disk_rate"}
    for one in ASSUMPTIONS:
        values = [one.low, one.likely, one.high]
        assert values == sorted(values, reverse=one.name in helpful), one.name
    assert len(assumptions.dump()) == len(ASSUMPTIONS)


def test_what_halves_the_time_is_named_and_fits():
    made = costs({"iterations": 1, "generation": {"max_rows": 8, "prompts_per_part": 4}}, num_prompts=4000)
    texts = faster(made, lambda changed: sum(changed.seconds().values()) / 3600)
    assert any(text.startswith("twice the GPUs (2 x toy)") for text in texts)
    tight = replace(made, hardware=replace(GPU, memory=memory_bytes(made)["search"]))
    assert not any("max_rows" in text for text in faster(tight, lambda changed: sum(changed.seconds().values())))
    assert fitting_rows(tight) == 8
    assert fitting_rows(replace(made, hardware=replace(GPU, memory=1.0))) is None


def test_times_are_printed_in_a_unit_that_suits():
    assert time_span(Range(1.06, 2.06, 14.7)) == ("1.1 to 15 h", "2.1 h")
    assert time_span(Range(0.1, 0.2, 0.5)) == ("6 to 30 min", "12 min")
    assert time_span(Range(0, 0.001, 0.002)) == ("0 to 7.2 s", "3.6 s")


def offline(recipe: str, gpu: str, *overrides: str):
    return estimate(load_config(ROOT / "recipes" / recipe, overrides), Silent(), offline=True, hardware=parse_gpu(gpu))


def test_an_estimate_is_dumped_with_ranges_and_assumptions():
    found = json.loads(json.dumps(offline("llava-1.5-7b.yaml", "h200", "data.limit=13000").dump()))["estimate"]
    assert set(found["hours"]) == {*STAGES, "total"}
    for hours in found["hours"].values():
        assert hours["low"] <= hours["likely"] <= hours["high"]
    for case in ("low", "likely", "high"):
        assert found["hours"]["total"][case] == pytest.approx(sum(found["hours"][s][case] for s in STAGES), rel=0.01)
    assert found["memory_gb"] < 141
    assert found["disk_gb"] > 0
    assert found["assumptions"][0]["source"]
    assert found["prompt_tokens"]["image"] == 576
    assert found["measured"] is None


def test_what_does_not_fit_is_a_warning_with_a_setting_that_does():
    warnings = " ".join(offline("llava-1.5-7b.yaml", "4090").warnings)
    assert re.search(r"search does not fit: \d+ to \d+ GB on a GPU with 24 GB", warnings)
    assert "model.quantization=nf4" in warnings
    smaller = " ".join(offline("llava-1.5-7b-24gb.yaml", "4090", "generation.max_rows=256").warnings)
    assert "set generation.max_rows=64" in smaller


def scaling_page() -> str:
    return (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


PLANS = {
    "one H200": ("h200", "llava-1.5-7b.yaml", "data.limit=13000"),
    "eight H200": ("h200:8", "llava-1.5-7b-8gpu.yaml", "data.limit=13000"),
    "64 H200": ("h200:64", "llava-1.5-7b-8gpu.yaml", "data.limit=10000000", "generation.prompts_per_part=1024"),
}


@pytest.mark.parametrize("plan", PLANS)
def test_the_calculation_by_hand_agrees_within_a_fifth(plan):
    """Compare the likely hours with the table of docs/scaling.md, which was calculated without the program."""
    gpu, recipe, *overrides = PLANS[plan]
    table = scaling_page().split(f"<!-- by hand: {plan} -->")[1].split("<!-- end -->")[0]
    rows = dict(re.findall(r"^\| ([a-z ]+?) \|.*\| ([\d.,]+) h \|$", table, re.MULTILINE))
    hours = offline(recipe, gpu, *overrides).plan.hours
    assert {"search", "prefill", "claims", "training", "total"} <= set(rows)
    for stage, by_hand in rows.items():
        assert hours[stage].likely == pytest.approx(float(by_hand.replace(",", "")), rel=0.2), stage


def test_a_comparable_run_replaces_assumptions(tmp_path):
    made = config(model={"path": "org/toy-1m", "device": "cpu"}, iterations=2)
    run = Run.create(tmp_path / "run", made)
    write_prompts(run.prompts_path, [Prompt(str(n), "x.png", "What?") for n in range(8)], 4, run.root)
    run.mark_done(0, "prompts", sha256="", accepted=8, heldout=0)
    run.mark_done(1, "generate", devices={"NVIDIA H200": 8}, processes=1, seconds=40.0)
    run.mark_done(1, "pairs", seconds=8.0)
    h200 = GPUS["h200"]
    assert last_comparable_run(made, GPUS["h100"], [run.root]) is None, "another GPU"
    assert last_comparable_run(made, replace(h200, count=2), [run.root]) is None
    other = config(method={"search": {"num_candidates": 9}}, iterations=2)
    assert set(last_comparable_run(other, h200, [run.root]).seconds_per_prompt) == {"pairs"}
    found = last_comparable_run(made, h200, [tmp_path, run.root])
    assert found.seconds_per_prompt == {"generate": 5.0, "pairs": 1.0}
    planned = replace(costs({"iterations": 2}), hardware=h200)
    seconds = planned.seconds()
    factors = found.factors(seconds, made, num_prompts=16, case=1)
    scaled = {name: seconds[name] * factor for name, factor in factors.items()}
    assert scaled["search"] + scaled["prefill"] + scaled["scoring"] == pytest.approx(5.0 * 16 * 2)
    assert scaled["claims"] + scaled["pairs"] == pytest.approx(1.0 * 16 * 2)
    os.truncate(run.root / "iteration-1" / "done" / "generate.json", 5)
    assert last_comparable_run(made, h200, [run.root]) is None, "a damaged run measures nothing"


def test_lengths_are_estimated_where_no_processor_is(tmp_path):
    from PIL import Image

    qwen = published_architecture("Qwen/Qwen2.5-VL-7B-Instruct")
    Image.new("RGB", (1280, 480)).save(tmp_path / "wide.png")
    prompts = [Prompt("1", str(tmp_path / "wide.png"), "x" * 40), Prompt("2", str(tmp_path / "missing.png"), "x" * 40)]
    made = config(model={"path": "Qwen/Qwen2.5-VL-7B-Instruct"})
    found = prompt_lengths(made, qwen, prompts)
    assert (found.image, found.mean) == (2 * 391, 2 * 391 + 30 + 10), "twice the pixels of 640 x 480"
    limited = config(model={"path": "Qwen/Qwen2.5-VL-7B-Instruct", "max_image_tokens": 300})
    assert prompt_lengths(limited, qwen, prompts).image == 300
    assert prompt_lengths(made, qwen, []).image == 391


def test_an_unknown_model_has_no_architecture():
    assert read_architecture(config(model={"path": "org/unknown"}).model, offline=True) is None
    guessed = read_architecture(config(model={"path": "org/other-7b"}).model, offline=True)
    assert guessed.source == "the size in its name"
    assert guessed.layer_parameters == pytest.approx(6.9e9, rel=0.05)
