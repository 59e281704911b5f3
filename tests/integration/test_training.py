"""Test DPO: which parameters change, the reference, and the adapter."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks.stock import stock_batch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from csr_vlm.config.load import resolve
from csr_vlm.config.schema import TrainingConfig, preset_date, presets
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Silent
from csr_vlm.core.records import Pair, Prompt
from csr_vlm.generation.transformers_engine import TransformersEngine
from csr_vlm.method.pairs import make_pairs
from csr_vlm.method.search import search
from csr_vlm.models.loading import load_base, load_policy
from csr_vlm.pipeline.loop import align
from csr_vlm.pipeline.stages import check_inputs
from csr_vlm.scoring.claim_scorer import ClaimScorer
from csr_vlm.scoring.registry import load_scorer
from csr_vlm.store.run import Run
from csr_vlm.store.tables import PairFiles
from csr_vlm.training.collator import PairCollator
from csr_vlm.training.dpo import merge, train, trainable_policy, trainer_arguments
from csr_vlm.training.reference import verify_reference
from csr_vlm.training.reporting import FinishWandbRun
from csr_vlm.world.demo import assets
from tests.integration.conftest import small_config
from tests.integration.training_setup import write_pairs

CONFIG = TrainingConfig.model_validate(
    {"lora": {"r": 4, "alpha": 8}, "trl": {"learning_rate": 1e-3, "per_device_train_batch_size": 4}}
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> object:
    return small_config(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def pairs(config, prompts: list[Prompt], policy) -> list[Pair]:
    engine = TransformersEngine(policy)
    scorer = load_scorer(config.scorer, "cpu")
    scorer.set_negative_images(prompts, config.scorer.others)
    trees = search(
        prompts,
        lambda requests: engine.propose(requests, config.method.search),
        scorer.score,
        config.method,
        iteration=1,
        seed=0,
        scorer="clip",
        score_claims=ClaimScorer(scorer, config.method.claims),
    )
    results = [make_pairs(t.prompt, t.nodes, config.method, "clip", 0) for t in trees]
    return [result[0] for result in results if not isinstance(result, str)]


def run_training(pairs: Sequence[Pair], config, directory: Path, previous: Path | None = None, training=CONFIG) -> dict:
    return train(
        write_pairs(pairs, directory),
        config.model,
        training,
        previous=previous,
        adapter=directory / "adapter",
        work=directory / "work",
        seed=1,
    )


def test_the_first_loss_is_log_two_and_the_reference_comes_from_the_ledger(pairs, config, tmp_path: Path) -> None:
    result = run_training(pairs, config, tmp_path)
    assert result["reference"] == "ledger"
    assert result["reference_difference"] < 1e-4
    assert float(result["log"][0]["loss"]) == pytest.approx(0.693147, abs=1e-4)
    assert any(pair.shared_tokens for pair in pairs)
    assert float(result["log"][0]["rewards/chosen"]) == pytest.approx(0, abs=1e-4), "shared tokens count on one side"
    assert float(result["log"][-1]["rewards/margins"]) > 0


def test_training_with_the_ledgers_reference_equals_training_with_trls(pairs, config, tmp_path: Path) -> None:
    from_model = CONFIG.model_copy(update={"reference": "model"})
    ledger = run_training(pairs, config, tmp_path / "a")
    model = run_training(pairs, config, tmp_path / "b", training=from_model)
    assert (ledger["reference"], model["reference"]) == ("ledger", "model")
    losses = [[float(entry["loss"]) for entry in r["log"]] for r in (ledger, model)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][0] != losses[0][-1]


def test_a_wrong_ledger_is_detected_and_not_used(pairs, config, tmp_path: Path) -> None:
    wrong = [replace(p, chosen=replace(p.chosen, logprob=p.chosen.logprob - 1.0)) for p in pairs]
    result = run_training(wrong, config, tmp_path)
    assert result["reference"] == "model"
    assert result["reference_difference"] == pytest.approx(1.0, abs=1e-3)


def test_only_the_language_models_adapter_is_trained(pairs, config, tmp_path: Path) -> None:
    run_training(pairs, config, tmp_path)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved
    assert all("language_model" in name and "lora_" in name for name in saved)
    assert not any("vision" in name or "projector" in name for name in saved)
    assert all(tensor.abs().sum() > 0 for name, tensor in saved.items() if "lora_B" in name)


def test_the_second_iteration_continues_from_the_first(pairs, config, prompts, tmp_path: Path) -> None:
    run_training(pairs, config, tmp_path / "one")
    first = tmp_path / "one" / "adapter"
    started = trainable_policy(config.model, CONFIG, first)
    merged = load_policy(config.model, first)
    ids = [pair.chosen.token_ids for pair in pairs[:4]]
    asked_prompts = [pair.prompt for pair in pairs[:4]]
    started.model.eval()
    for left, right in zip(
        started.teacher_forced(asked_prompts, ids), merged.teacher_forced(asked_prompts, ids), strict=True
    ):
        assert torch.allclose(left, right, atol=1e-4)
    # The base's log-probabilities are no longer the policy's.
    difference, holds = verify_reference(started, PairFiles(write_pairs(pairs, tmp_path)), 1e-3, 8192)
    assert difference > 1e-3
    assert not holds
    run_training(pairs, config, tmp_path / "two", previous=first)
    before = load_file(first / "adapter_model.safetensors")
    after = load_file(tmp_path / "two" / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_adapter_on_the_base_and_merged_model_give_the_same_logits(pairs, config, tmp_path: Path) -> None:
    run_training(pairs, config, tmp_path)
    merge(config.model, tmp_path / "adapter", tmp_path / "model")
    base, _ = load_base(config.model)
    merged_model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    batch = stock_batch(load_policy(config.model, None), pairs[:4])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    with torch.inference_mode():
        unadapted = base(**inputs).logits
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()(**inputs).logits
        merged = merged_model(**inputs).logits
    assert torch.allclose(adapted, merged, atol=1e-4)
    assert not torch.allclose(adapted, unadapted, atol=1e-3)


def test_the_completion_mask_marks_the_response_after_the_tokens_that_both_sides_share(pairs, config) -> None:
    policy = load_policy(config.model, None)
    two = sorted(pairs, key=lambda pair: -pair.shared_tokens)[:2]
    assert two[0].shared_tokens > 0
    (batch,) = PairCollator(policy, 8192).passes(two)
    assert batch["input_ids"].shape[0] == 4
    two.sort(key=lambda pair: batch["prompt_ids"].index(pair.prompt.prompt_id))
    for row, (pair, response) in enumerate([*((p, p.chosen) for p in two), *((p, p.rejected) for p in two)]):
        marked = batch["input_ids"][row][batch["completion_mask"][row].bool()]
        assert tuple(marked.tolist()) == response.token_ids[pair.shared_tokens :]
    expected = [pair.chosen.logprob - pair.shared_logprob for pair in two]
    assert batch["ref_chosen_logps"].tolist() == pytest.approx(expected)


def test_the_projector_trains_at_its_own_learning_rate(pairs, config, tmp_path: Path) -> None:
    training = CONFIG.model_copy(update={"projector_learning_rate": 1e-2})
    run_training(pairs, config, tmp_path, training=training)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    projector = {name: tensor for name, tensor in saved.items() if "multi_modal_projector" in name}
    assert projector
    base = load_file(assets() / "llava" / "model.safetensors")
    changes = []
    for name, tensor in projector.items():
        original = next(t for key, t in base.items() if key.endswith(name.split("multi_modal_projector.")[-1]))
        changes.append((tensor - original.float()).abs().max())
    # The size of Adam's first step is the learning rate: 1e-2 here, 1e-3 for the LoRA.
    assert max(changes) > 5e-3
    previous = tmp_path / "adapter"
    again = run_training(pairs, config, tmp_path / "again", previous=previous, training=training)
    assert again["num_pairs"] == len(pairs)


def test_invalid_trainings_are_refused_with_a_reason(pairs, config, tmp_path: Path) -> None:
    with pytest.raises(CsrError, match="no pairs"):
        run_training([], config, tmp_path)
    with pytest.raises(CsrError, match=r"training\.trl.*learning_rat"):
        run_training(pairs, config, tmp_path, training=CONFIG.model_copy(update={"trl": {"learning_rat": 1.0}}))
    with pytest.raises(CsrError, match=r"DPO diverged: step \d+ has the loss nan"):
        run_training(pairs, config, tmp_path, training=CONFIG.model_copy(update={"trl": {"learning_rate": 1e30}}))
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(CsrError, match="output_dir"):
        run_training(pairs, config, tmp_path, training=CONFIG.model_copy(update={"trl": {"output_dir": "x"}}))


class SummaryWriter:
    """Provide the methods that TensorBoard's callback calls on its writer."""

    def __init__(self, log_dir: str) -> None:
        self._path = Path(log_dir) / "scalars.txt"
        self._path.parent.mkdir(parents=True)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        with self._path.open("a") as file:
            print(name, step, file=file)

    def add_text(self, *args: object) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class Board(TensorBoardCallback):
    """Run the library's callback without the tensorboard package, with another file format."""

    def __init__(self) -> None:
        self._SummaryWriter = SummaryWriter
        self.tb_writer = None
        self.logging_dir = os.getenv("TENSORBOARD_LOGGING_DIR")


def test_report_to_is_passed_to_trl_and_reports_outlive_the_trainer(pairs, config, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Board)
    trl = {**CONFIG.trl, "report_to": ["tensorboard"], "num_train_epochs": 1}
    directory = tmp_path / "llava" / "iteration-1"
    result = run_training(pairs, config, directory, training=CONFIG.model_copy(update={"trl": trl}))
    lines = (directory / "tensorboard" / "scalars.txt").read_text().split("\n")
    steps = [line for line in lines if line.startswith("train/loss ")]
    assert steps == [f"train/loss {number}" for number in range(1, len(result["log"]) + 1)]
    assert trainer_arguments(CONFIG, directory / "work", 0, "cpu").run_name == "llava-iteration-1"
    assert trainer_arguments(CONFIG, directory / "work", 0, "cpu").report_to == []


@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        ("tensorbord", "'tensorbord' is not a valid tracker (did you mean tensorboard?)"),
        (["none", "wandb"], "wandb is not installed (pip install wandb)"),
    ],
)
def test_an_unavailable_tracker_is_refused_before_any_work(
    config, tmp_path: Path, monkeypatch, report_to, message: str
) -> None:
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", list)
    training = config.training.model_copy(update={"trl": {"report_to": report_to}})
    with pytest.raises(CsrError, match=re.escape(message)):
        check_inputs(Run.create(tmp_path, config.model_copy(update={"training": training})), Silent())
    assert not (tmp_path / "prompts.parquet").exists()


def test_every_iteration_gets_its_own_wandb_run(monkeypatch) -> None:
    finished = []
    wandb = SimpleNamespace(run=None, finish=lambda: finished.append(wandb.run))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    callback = FinishWandbRun()
    wandb.run = "started by the training"
    callback.on_train_end(None, None, None)
    assert finished == ["started by the training"]
    FinishWandbRun().on_train_end(None, None, None)
    assert len(finished) == 1, "a run that was open before is not finished"


@pytest.mark.parametrize("name", sorted(presets()))
def test_trl_accepts_the_training_of_every_preset(name: str, tmp_path: Path) -> None:
    required = {"model": {"path": "model-2m"}, "scorer": {"path": "s"}, "data": {"prompts": "p", "pairs": "q"}}
    training = resolve({"preset": name, **required}).training
    arguments = trainer_arguments(training, tmp_path, 0, "cpu")
    assert arguments.learning_rate == training.trl["learning_rate"]
    assert arguments.get_warmup_steps(1000) == (30 if name in ("paper", "official") else 0)
    assert not arguments.remove_unused_columns
    assert arguments.max_length is None


def test_the_official_preset_runs_unchanged(tmp_path: Path, prompts) -> None:
    config = small_config(tmp_path, preset="official", iterations=1, training={})
    run = Run.create(tmp_path / "run", config)
    align(run, Silent())
    saved = load_file(run.root / "adapter" / "adapter_model.safetensors")
    assert not any("multi_modal_projector" in name for name in saved), "the code's projector is frozen"
    statuses = run.result(1, "generate")["statuses"]
    assert statuses["bottom"] > 0
    assert run.result(1, "train")["reference"] == "ledger"
    manifest = json.loads(run.manifest_path.read_text(encoding="utf-8"))
    assert manifest["preset"] == {"name": "official", "date": preset_date("official")}
