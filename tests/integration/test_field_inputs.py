"""Run what people bring: pictures and prompts that a model's processor refuses, found early, late, and in old runs."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from csr_vlm.cli.app import app
from csr_vlm.config.load import load_config
from csr_vlm.config.schema import RunConfig
from csr_vlm.core.errors import CsrError, PromptError
from csr_vlm.core.progress import Silent
from csr_vlm.core.records import Prompt
from csr_vlm.pipeline import gates, stages, tasks
from csr_vlm.pipeline.estimate import estimate
from csr_vlm.pipeline.loop import align
from csr_vlm.store import files, ledger, tables
from csr_vlm.store.run import Run
from csr_vlm.world.demo import assets
from tests.families.checkpoints import checkpoint
from tests.integration.conftest import small_config

FIELD = Path(__file__).parents[1] / "data" / "field"


class Log(Silent):
    """Keep the log lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)


def field_config(case: str, model: Path, **data: Any) -> RunConfig:
    """Configure a run as the cases' base.yaml does, with paths of this machine."""
    changed = {"model": {"path": str(model), "device": "cpu"}, "scorer": {"path": str(assets() / "clip")}}
    prompts = {"prompts": str(FIELD / case / "prompts.jsonl"), **data}
    config = load_config(FIELD / "base.yaml").dump() | changed
    return load_config(None, base=config | {"data": prompts, "preset": "calibrated"})


def checked(config: RunConfig, root: Path) -> tuple[Run, list[str]]:
    log, run = Log(), Run.create(root, config)
    stages.check_inputs(run, log)
    return run, log.lines


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "pixtral", "mistral3"])
@pytest.mark.parametrize(
    ("case", "accepted", "line"), [("01-picture-the-processor-refuses", 4, 5), ("03-bad-row-found-late", 47, 41)]
)
def test_a_picture_that_the_processor_refuses_is_dropped_by_name(
    tmp_path: Path, family: str, case: str, accepted: int, line: int
) -> None:
    run, log = checked(field_config(case, checkpoint(family)), tmp_path / "run")
    found = run.result(0, "prompts")
    assert (found["accepted"], found["dropped"]) == (accepted, {"refused by the model's processor": 1})
    assert found["examples"][0].startswith(f"prompts.jsonl line {line}: refused by the model's processor: ValueError")
    assert "dropped 1 prompt: 1 refused" in log[0]
    assert f"prompts.jsonl line {line}" in log[0]
    with pytest.raises(CsrError, match=f"line {line}: refused by the model's processor"):
        checked(field_config(case, checkpoint(family), on_bad_input="refuse"), tmp_path / "strict")
    assert not (tmp_path / "strict").exists() or not (tmp_path / "strict" / "prompts.parquet").exists()


@pytest.mark.parametrize(
    ("case", "family", "tokens"),
    [
        ("02-other-placeholder-gemma-boi", "gemma3", ["<start_of_image>"]),
        ("02-other-placeholder-qwen", "qwen3_vl", ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]),
        ("02-other-placeholder-qwen-video", "qwen3_vl", ["<|video_pad|>"]),
    ],
)
def test_the_models_own_placeholders_are_removed_and_named(
    tmp_path: Path, case: str, family: str, tokens: list[str]
) -> None:
    run, log = checked(field_config(case, checkpoint(family)), tmp_path / "run")
    assert [prompt.text for prompt in run.prompts()] == ["What is it?"] * 5
    assert run.result(0, "prompts")["removed"] == dict.fromkeys(tokens, 1)
    assert all(f"{token} from 1" in log[0] for token in tokens)
    other, log = checked(field_config(case, assets() / "llava"), tmp_path / "other")
    assert "removed" not in other.result(0, "prompts"), "a placeholder of another model is text"


def test_a_prompt_that_is_longer_than_the_context_is_dropped(tmp_path: Path) -> None:
    config = field_config("13-prompt-longer-than-the-context", assets() / "llava")
    run, _ = checked(config, tmp_path / "run")
    assert run.result(0, "prompts")["dropped"] == {"longer than the model's context": 1}
    estimated = estimate(config, Silent())
    assert (estimated.prompts, dict(estimated.data["dropped"])) == (4, {"longer than the model's context": 1})
    assert "prompts.jsonl line 5" in estimated.warnings[0]


def test_prompts_about_one_image_are_contrasted_with_a_gray_one(tmp_path: Path) -> None:
    config = field_config("01-picture-the-processor-refuses", assets() / "llava", limit=2)
    run, log = checked(config, tmp_path / "run")
    assert "all prompts are about one image" in log[-1]
    stages.generate(run, 1, Silent())
    assert all("clip:others" in node.cosines for tree in ledger.trees(run, 1) for node in tree if node.sentence)


def test_pairs_go_through_the_processor_too(tmp_path: Path) -> None:
    Image.new("RGB", (20, 5000)).save(tmp_path / "tall.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "good.png")
    sides = {"chosen": "There is a boat.", "rejected": "There is a fish."}
    rows = [
        {"id": 1, "image": "good.png", "question": "<|image_pad|>What is it?", **sides},
        {"id": 2, "image": "tall.png", "question": "What is it?", **sides},
        {"id": 3, "image": "good.png", "question": "What is it?", **sides, "chosen": "There is a boat. " * 1200},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = {"pairs": str(tmp_path / "pairs.jsonl")}
    run, _ = checked(
        field_config("01-picture-the-processor-refuses", checkpoint("qwen2_vl"), **pairs), tmp_path / "run"
    )
    found = run.result(0, "prompts")["pairs"]
    assert (found["accepted"], found["removed"]) == (1, {"<|image_pad|>": 1})
    assert found["dropped"] == {"refused by the model's processor": 1, "longer than the model's context": 1}
    stages.make_pairs(run, 1, Silent())
    assert [pair.prompt.text for pair in run.pairs(1)] == ["What is it?"]


# Prompts that fail in the search ------------------------------------------------------------------


def begun_before(run: Run, bad: dict[int, str]) -> None:
    """Check the inputs as version 0.1 did, without a processor; ``bad`` maps positions to texts that it refuses."""
    stages.store_inputs(run, Silent(), model=None)
    prompts = [
        Prompt(prompt.prompt_id, prompt.image, bad.get(index, prompt.text), prompt.image_sha256)
        for index, prompt in enumerate(run.prompts())
    ]
    tables.write_prompts(run.prompts_path, prompts, run.config.generation.prompts_per_part, run.root)
    result = {key: value for key, value in run.result(0, "prompts").items() if key not in ("sha256", "files")}
    run.mark_done(0, "prompts", [run.heldout_path], sha256=files.sha256_of(run.prompts_path), **result)


def test_a_run_that_was_begun_before_its_bad_rows_were_known_goes_on(tmp_path: Path) -> None:
    short = {"search": {"max_sentences": 2, "num_candidates": 3}}
    training = {"trl": {"max_steps": 1, "per_device_train_batch_size": 4}}
    config = small_config(
        tmp_path, iterations=1, evaluation={"heldout": 2, "audit": "warn"}, method=short, training=training
    )
    run, good = (Run.create(tmp_path / name, config) for name in ("run", "good"))
    begun_before(run, {0: "<image>What is it?"})
    log = Log()
    align(run, log)
    failed = run.failed_prompts(1)
    ids = [prompt.prompt_id for prompt in run.prompts()]
    assert set(failed) == {ids[0]}
    assert run.result(1, "generate")["failed"] == failed
    assert any(f"prompt {ids[0]} failed in the search and is dropped: ValueError" in line for line in log.lines)
    assert run.is_done(1, "train")
    assert run.result(1, "pairs")["prompts_without"]["failed"] == 1
    assert [bool(tree) for tree in ledger.trees(run, 1)] == [False] + [True] * (len(ids) - 1)
    stages.store_inputs(good, Silent(), model=None)
    stages.generate(good, 1, Silent())
    tokens = [
        [[(node.node_id, node.token_ids) for node in tree] for tree in ledger.trees(one, 1)][1:] for one in (run, good)
    ]
    assert tokens[0] == tokens[1]


def failing(bad: Sequence[str], error: Exception) -> Any:
    original = tasks.search

    def search(prompts: Sequence[Prompt], *args: Any, **options: Any) -> Any:
        if any(prompt.prompt_id in bad for prompt in prompts):
            raise error
        return original(prompts, *args, **options)

    return search


@pytest.fixture(scope="module")
def checked_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = small_config(tmp_path_factory.mktemp("world"), iterations=1, evaluation={"heldout": 0})
    run = Run.create(tmp_path_factory.mktemp("run") / "checked", config)
    stages.store_inputs(run, Silent(), model=None)
    return run


@pytest.mark.parametrize("error", [RuntimeError("odd\nshape"), PromptError("the server returned status 400")])
def test_a_prompt_that_raises_in_the_search_is_dropped_and_named(
    checked_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run = Run.open(shutil.copytree(checked_run.root, tmp_path / "run"))
    ids = [prompt.prompt_id for prompt in run.prompts()]
    monkeypatch.setattr(tasks, "search", failing([ids[5], ids[15]], error))
    stages.generate(run, 1, Silent())
    assert set(run.failed_prompts(1)) == {ids[5], ids[15]}
    assert [bool(tree) for tree in ledger.trees(run, 1)] == [index not in (5, 15) for index in range(16)]
    stages.make_pairs(run, 1, Silent())
    assert gates.pair_metrics(run, 1, run.config)["pairs"] > 0
    for path in (run.root / "iteration-1" / "failed").iterdir():
        path.unlink()
    with pytest.raises(CsrError, match="is missing"):
        list(ledger.trees(run, 1))


def test_too_many_failures_stop_the_run_and_an_option_lets_it_go_on(
    checked_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.open(shutil.copytree(checked_run.root, tmp_path / "run"))
    bad = [prompt.prompt_id for prompt in run.prompts()][:4]
    monkeypatch.setattr(tasks, "search", failing(bad, RuntimeError("odd shape")))
    with pytest.raises(
        CsrError, match=r"4 of 16 prompts failed in the search, such as .*: RuntimeError: odd"
    ) as stopped:
        stages.generate(run, 1, Silent())
    assert "data.max_failed_share" in stopped.value.hint
    patient = run.config.model_copy(update={"data": run.config.data.model_copy(update={"max_failed_share": 0.5})})
    again = Run.create(run.root, patient)
    stages.generate(again, 1, Silent())
    assert set(again.failed_prompts(1)) == set(bad)


@pytest.mark.parametrize("error", [CsrError("the server is gone"), MemoryError(), OSError(28, "disk full")])
def test_what_concerns_all_prompts_stops_at_once(
    checked_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run = Run.open(shutil.copytree(checked_run.root, tmp_path / "run"))
    monkeypatch.setattr(tasks, "search", failing([next(run.prompts()).prompt_id], error))
    with pytest.raises(type(error)):
        stages.generate(run, 1, Silent())
    assert not run.ledger_files(1)


# Starts that fail -------------------------------------------------------------------------------


def without_weights(folder: Path) -> str:
    copy = shutil.copytree(assets() / "llava", folder / "broken")
    for weights in copy.glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:5000])
    return str(copy)


def broken_engine(folder: Path) -> list[str]:
    """Install a vLLM that was built for another machine, until the test ends."""
    (folder / "site" / "vllm").mkdir(parents=True)
    (folder / "site" / "vllm" / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open it')")
    sys.path.insert(0, str(folder / "site"))
    return ["generation.engine=vllm"]


STARTS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "model": (lambda folder: ["model.path=./nowhere"], "there is no such directory"),
    "weights": (lambda folder: [f"model.path={without_weights(folder)}"], "cannot be loaded"),
    "adapter": (lambda folder: [f"model.adapter={folder}"], "there is no adapter"),
    "scorer": (lambda folder: ["scorer.path=./nowhere"], "the scorer ./nowhere cannot be loaded"),
    "tracker": (lambda folder: ["training.trl.report_to=[nothing]"], "is not a valid tracker"),
    "broken engine": (broken_engine, "vllm is installed but cannot be imported: libcudart.so.13: cannot open"),
    "engine": (lambda folder: ["generation.engine=vllm"], "vllm is not installed"),
    "server": (lambda folder: ["generation.engine=server", "generation.server=http://127.0.0.1:9"], "no response from"),
    "prompts": (lambda folder: [f"data.prompts={folder / 'none.jsonl'}"], "cannot be opened"),
    "images": (lambda folder: ["data.image_root=/nonexistent"], "no usable prompt"),
}


@pytest.mark.parametrize("kind", STARTS)
def test_a_failed_start_leaves_nothing_behind_and_is_found_by_check(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "runs" / "new"
    recipe.write_text(yaml.safe_dump(small_config(tmp_path, iterations=1).dump()))
    make, message = STARTS[kind]
    overrides = make(tmp_path)
    for arguments in (["check"], ["run"], ["generate"]):
        result = CliRunner().invoke(app, [*arguments, str(recipe), *overrides, "--out", str(out), "--quiet"])
        assert isinstance(result.exception, CsrError), result.output
        assert message in result.exception.message
        assert not (tmp_path / "runs").exists()


def test_a_failed_start_leaves_an_existing_folder_as_it_was(tmp_path: Path) -> None:
    config = small_config(tmp_path, iterations=1, model={"path": "./nowhere"})
    for name, content in (("empty", None), ("used", "mine")):
        root = tmp_path / name
        root.mkdir()
        if content:
            (root / "notes.txt").write_text(content)
        run = Run.create(root, config)
        with pytest.raises(CsrError):
            align(run, Silent())
        assert root.is_dir()
        assert (root / "config.yaml").exists() == bool(content), "only what the run made is deleted"
    assert (tmp_path / "used" / "notes.txt").read_text() == "mine"


def test_a_finished_stage_is_kept_when_a_later_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(tmp_path / "run", small_config(tmp_path, iterations=1))
    monkeypatch.setattr(stages, "evaluate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        align(run, Silent())
    assert run.is_done(0, "prompts")


def test_check_looks_for_a_place_to_write(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_config(tmp_path, iterations=1).dump()))
    result = CliRunner().invoke(app, ["check", str(recipe), "--offline", "--out", str(recipe / "run")])
    assert "is a file, so" in result.exception.message
