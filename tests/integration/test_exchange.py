"""Exported pairs in another trainer, and pairs from outside in this one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from csr_vlm.config import RunConfig
from csr_vlm.data.pairs import TextPair, write_pairs
from csr_vlm.errors import CsrError
from csr_vlm.generation.policy import Policy
from csr_vlm.generation.sentences import SentenceRule
from csr_vlm.loop import align
from csr_vlm.progress import Silent
from csr_vlm.records import Prompt
from csr_vlm.store import tables
from csr_vlm.store.run import Run
from csr_vlm.training.external import count_sentences, response_ids, scored_pairs
from csr_vlm.world.demo import assets
from tests.integration.conftest import small_config
from tests.integration.test_cli import csr

RULE = SentenceRule(".")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of one iteration, whose pairs are exported."""
    config = small_config(tmp_path_factory.mktemp("world"), iterations=1)
    run = Run.create(tmp_path_factory.mktemp("searched"), config)
    align(run, Silent())
    return run


def export(run: Run, form: str, out: Path, *options: str) -> Path:
    return Path(csr("export", run.root, "--format", form, "--out", out, *options).stdout.strip())


def external_config(run: Run, pairs: Path, **changes: Any) -> RunConfig:
    data = run.config.data.model_copy(update={"pairs": str(pairs), "image_root": "/"} | changes.pop("data", {}))
    return run.config.model_copy(update={"data": data} | changes)


def test_the_trl_export_trains_in_trls_own_trainer(searched: Run, tmp_path: Path) -> None:
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    path = export(searched, "trl", tmp_path / "out", "--copy-images")
    dataset = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    model = AutoModelForImageTextToText.from_pretrained(assets() / "llava", dtype=torch.float32)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            max_length=None,  # The default would cut image tokens off.
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
        ),
        train_dataset=dataset,
        processing_class=AutoProcessor.from_pretrained(assets() / "llava"),
        peft_config=LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.global_step == len(losses) == 2
    assert float(losses[0]) == pytest.approx(0.693147, abs=1e-4)
    assert float(losses[1]) < 0.693
    moved = [p for name, p in trainer.model.named_parameters() if "lora_B" in name and p.abs().sum() > 0]
    assert moved


@pytest.mark.parametrize("form", ["llava", "rlaifv"])
def test_a_runs_own_pairs_come_back_as_they_were(searched: Run, tmp_path: Path, form: str) -> None:
    """Same ids and log-probabilities: text from outside is tokenised as the policy samples it."""
    run = Run.create(tmp_path / "run", external_config(searched, export(searched, form, tmp_path / "out")))
    align(run, Silent())
    own, back = (list(tables.read_pairs(r.pairs_path(1))) for r in (searched, run))
    same = [a.chosen.token_ids == b.chosen.token_ids and a.rejected.token_ids == b.rejected.token_ids
            for a, b in zip(own, back, strict=True)]  # fmt: skip
    assert sum(same) >= 0.95 * len(same), "now and then the model spells a word in other tokens"
    for a, b in (pair for pair, equal in zip(zip(own, back, strict=True), same, strict=True) if equal):
        assert b.chosen.logprob == pytest.approx(a.chosen.logprob, abs=1e-3)
        assert b.rejected.logprob == pytest.approx(a.rejected.logprob, abs=1e-3)
        assert b.chosen.num_sentences == a.chosen.num_sentences
    trained = run.result(1, "train")
    assert trained["reference_difference"] < 1e-3, "what is stored is the model's own"
    assert float(trained["log"][0]["loss"]) == pytest.approx(
        float(searched.result(1, "train")["log"][0]["loss"]), abs=0.02
    )
    assert run.result(0, "prompts")["pairs"]["accepted"] == len(own)
    assert not run.ledger_parts(1)
    assert (run.root / "report.html").is_file()
    assert all(Path(pair.prompt.image).is_relative_to(run.root) for pair in back) == (form == "rlaifv")


def test_after_pairs_from_outside_the_loop_searches(searched: Run, tmp_path: Path) -> None:
    path = export(searched, "swift", tmp_path / "out")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0] |= {"rejected_response": rows[0]["messages"][-1]["content"]}
    rows[1] |= {"images": ["/nowhere.png"]}
    path.write_text("\n".join(map(json.dumps, rows)))
    config = external_config(searched, path, iterations=2, preset="external")
    run = Run.create(tmp_path / "run", config)
    align(run, Silent())
    found = run.result(0, "prompts")["pairs"]
    assert found["accepted"] == len(rows) - 2
    assert found["dropped"] == {"identical responses": 1, "missing": 1}
    assert run.result(1, "pairs")["pairs"] == len(rows) - 2
    assert not run.ledger_parts(1)
    assert run.ledger_parts(2)
    assert run.is_done(2, "train")
    shown = csr("show", run.root).stdout
    assert str(len(rows) - 2) in shown
    refused = csr("pairs", run.root, "--iteration", 1, "method.lambda=0.5", check=False)
    assert refused.returncode == 1
    assert "is not generated" in refused.stderr


def test_no_usable_pair_is_said_before_a_model_is_loaded(searched: Run, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text("[]")
    model = searched.config.model.model_copy(update={"path": "./nowhere"})
    run = Run.create(tmp_path / "run", external_config(searched, tmp_path / "p.json", model=model))
    with pytest.raises(CsrError, match="no usable pair"):
        align(run, Silent())


def test_a_response_ends_as_the_policy_ends_its_own(policy: Policy, prompts: list[Prompt]) -> None:
    ids = response_ids(policy, prompts[0], "There is a red boat.")
    assert policy.tokenizer.decode(ids[:-1]).strip() == "There is a red boat."
    assert ids[-1] in policy.eos_ids
    assert not set(ids[:-1]) & policy.eos_ids


def test_a_template_without_an_end_gets_one(policy: Policy, prompts: list[Prompt]) -> None:
    template = policy.processor.chat_template
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy.processor, "chat_template", template.replace("</s>", " "))
        assert response_ids(policy, prompts[0], "There is a boat.")[-1] == policy.tokenizer.eos_token_id
        without = response_ids(policy, prompts[0], "There is a boat.")
    assert without == response_ids(policy, prompts[0], "There is a boat.")


def test_a_response_that_holds_a_picture_is_refused(policy: Policy, prompts: list[Prompt]) -> None:
    pairs = [
        TextPair(prompts[0], "There is a boat. <image>", "There is a fish."),
        TextPair(prompts[1], "There is a boat.", "There is a fish."),
    ]
    refused, pair = scored_pairs(pairs, policy, 1, RULE)
    assert refused == "placeholder"
    assert pair.prompt == prompts[1]
    assert pair.chosen.logprob < 0
    assert pair.margin == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [("", 0), ("A boat", 1), ("A boat.", 1), ("A boat. A fish.", 2), ("It is 3.5 m. Yes.", 2), ("Dr. Low. And", 2)],
)
def test_sentences_are_counted_as_the_search_cuts_them(text: str, number: int) -> None:
    assert count_sentences(text, RULE) == number


def test_bytes_from_a_file_go_through_the_whole_loop(searched: Run, tmp_path: Path) -> None:
    """Images that come as bytes are scored, trained on and shown as any others."""
    pairs = list(tables.read_pairs(searched.pairs_path(1)))
    source = write_pairs(pairs, "rlaifv", tmp_path / "out", copy_images=True, origin="x")
    data = searched.config.data.model_copy(update={"prompts": str(source)})
    run = Run.create(tmp_path / "run", searched.config.model_copy(update={"data": data}))
    align(run, Silent())
    kept = {Path(prompt.image) for prompt in run.prompts()}
    assert kept == {path for path in (run.root / "images").rglob("*") if path.is_file()}
    own = {pair.prompt.prompt_id: pair for pair in pairs}
    for pair in tables.read_pairs(run.pairs_path(1)):
        assert pair.chosen.text == own[pair.prompt.prompt_id].chosen.text, "the same picture, seed and search"
    assert run.is_done(1, "train")
