"""Train on exported pairs in TRL, and on external pairs in the loop."""

from __future__ import annotations

import json
import shutil
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from csr_vlm.config.schema import RunConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Silent
from csr_vlm.core.records import Prompt
from csr_vlm.data.external_pairs import TextPair
from csr_vlm.method.sentences import SentenceRule
from csr_vlm.models.loading import load_prompt_encoder
from csr_vlm.models.policy import Policy
from csr_vlm.pipeline import stages
from csr_vlm.pipeline.loop import align
from csr_vlm.store import tables
from csr_vlm.store.run import Run
from csr_vlm.training.pair_encoding import count_sentences, encode_pairs, tokenize_response
from csr_vlm.world.demo import assets
from tests.integration.conftest import small_config
from tests.integration.test_cli import csr

RULE = SentenceRule(".")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a run of one iteration, whose pairs are exported."""
    whole = {"between": "responses", "per_prompt": 4, "min_margin": 0.0, "questions": {"pattern": ""}}
    config = small_config(tmp_path_factory.mktemp("world"), iterations=1, method={"pairs": whole})
    run = Run.create(tmp_path_factory.mktemp("searched"), config)
    align(run, Silent())
    return run


@pytest.fixture(scope="module")
def siblings(searched: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return the same run with pairs of siblings, most of which do not end."""
    root = tmp_path_factory.mktemp("siblings") / "run"
    shutil.copytree(searched.root, root)
    changed = searched.config.dump() | {"preset": "calibrated"}
    questions = small_config(root.parent).dump()["method"]["pairs"]["questions"]
    changed["method"]["pairs"] |= {"between": "siblings", "per_prompt": 12, "questions": questions}
    (root / "config.yaml").write_text(json.dumps(changed))
    (root / "iteration-1" / "done" / "pairs.json").unlink()
    run = Run.open(root)
    stages.make_pairs(run, 1, Silent())
    assert not all(pair.chosen.complete for pair in tables.read_pairs(run.pairs_path(1)))
    return run


def export(run: Run, form: str, out: Path, *options: str) -> Path:
    return Path(csr("export", run.root, "--format", form, "--out", out, *options).stdout.strip())


def external_config(run: Run, pairs: Path, **changes: Any) -> RunConfig:
    data = run.config.data.model_copy(update={"pairs": str(pairs), "image_root": "/"} | changes.pop("data", {}))
    return run.config.model_copy(update={"data": data} | changes)


@pytest.mark.parametrize("name", ["searched", "siblings"])
def test_the_trl_export_trains_in_trls_dpo_trainer(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    path = export(request.getfixturevalue(name), "trl", tmp_path / "out", "--copy-images")
    dataset = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    model = AutoModelForImageTextToText.from_pretrained(assets() / "llava", dtype=torch.float32)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            max_length=None,  # The default would truncate image tokens.
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
    assert isfinite(float(losses[1]))
    assert float(losses[1]) != pytest.approx(0.693147, abs=1e-6), "the policy changed after the first step"
    moved = [p for name, p in trainer.model.named_parameters() if "lora_B" in name and p.abs().sum() > 0]
    assert moved


@pytest.fixture(scope="module")
def external(searched: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a run whose prompts and first pairs come from an export with embedded images."""
    path = export(searched, "rlaifv", tmp_path_factory.mktemp("out"))
    config = external_config(searched, path, iterations=2, preset="external", data={"prompts": str(path)})
    run = Run.create(tmp_path_factory.mktemp("external"), config)
    align(run, Silent())
    return run


def test_exported_pairs_are_tokenized_as_sampled(searched: Run, external: Run) -> None:
    """External texts get the same token ids and log-probabilities as the sampled responses."""
    exported, imported = (list(tables.read_pairs(run.pairs_path(1))) for run in (searched, external))
    both = list(zip(exported, imported, strict=True))
    same = [
        (a, b)
        for a, b in both
        if (a.chosen.token_ids, a.rejected.token_ids) == (b.chosen.token_ids, b.rejected.token_ids)
    ]
    assert len(same) >= 0.9 * len(both), "the model sometimes samples a non-canonical tokenization"
    for a, b in same:
        assert b.chosen.logprob == pytest.approx(a.chosen.logprob, abs=1e-3)
        assert b.rejected.logprob == pytest.approx(a.rejected.logprob, abs=1e-3)
        assert b.chosen.num_sentences == a.chosen.num_sentences
    assert external.result(1, "train")["reference_difference"] < 1e-3, "the stored log-probabilities are the policy's"


def test_whole_responses_come_from_the_same_ledger(searched: Run, siblings: Run) -> None:
    """Trainers that end every response would learn to stop early from pairs that do not end."""
    assert stages.whole_response_pairs(siblings, 1) == list(tables.read_pairs(searched.pairs_path(1)))


def test_trl_gets_the_tokens_that_the_policy_sampled(siblings: Run, tmp_path: Path) -> None:
    """Prompt and response have the tokens of a row of our own training, also if a response does not end."""
    from datasets import load_dataset
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    path = export(siblings, "trl", tmp_path / "out", "--copy-images")
    pairs = [*siblings.pairs(1), *tables.read_pairs(siblings.questions_path(1))]
    processor = AutoProcessor.from_pretrained(assets() / "llava")
    collator = DataCollatorForVisionPreference(processor)
    encoder = load_prompt_encoder(siblings.config.model)
    rows = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    same = 0
    for row, pair in zip(rows, pairs, strict=True):
        batch = collator([row])
        prompt = encoder.process(pair.prompt)["input_ids"][0].tolist()
        actual = [
            ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        expected = [[*prompt, *side.token_ids] for side in (pair.chosen, pair.rejected)]
        same += actual == expected
    assert same >= 0.9 * len(pairs), "the model sometimes samples a non-canonical tokenization"


def test_later_iterations_search_after_external_pairs(searched: Run, external: Run) -> None:
    made = searched.result(1, "pairs")["pairs"]
    read = external.result(0, "prompts")["pairs"]
    assert (read["accepted"], read["dropped"], read["examples"]) == (made, {}, [])
    assert external.result(1, "pairs")["pairs"] == made
    assert not external.ledger_parts(1)
    assert external.ledger_parts(2)
    assert external.is_done(2, "train")
    assert (external.root / "report.html").is_file()
    assert f" {made} " in csr("show", external.root).stdout
    refused = csr("pairs", external.root, "--iteration", 1, "method.lambda=0.5", check=False)
    assert refused.returncode == 1
    assert "is not generated" in refused.stderr


def test_images_that_come_as_bytes_are_used_in_the_whole_loop(external: Run) -> None:
    kept = {path for path in (external.root / "images").rglob("*") if path.is_file()}
    assert {Path(prompt.image) for prompt in [*external.prompts(), *external.heldout()]} == kept
    assert {Path(pair.prompt.image) for pair in tables.read_pairs(external.pairs_path(2))} <= kept


def test_unusable_pairs_are_rejected_before_the_run_begins(searched: Run, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text("[]")
    run = Run.create(tmp_path / "run", external_config(searched, tmp_path / "p.json", data={"image_root": None}))
    with pytest.raises(CsrError, match="no usable pair"):
        align(run, Silent())
    assert not run.root.exists()


def test_a_tokenized_response_ends_with_an_end_of_sequence_token(policy: Policy, prompts: list[Prompt]) -> None:
    ids = tokenize_response(policy, prompts[0], "There is a red boat.")
    assert policy.tokenizer.decode(ids[:-1]).strip() == "There is a red boat."
    assert ids[-1] in policy.eos_ids
    assert not set(ids[:-1]) & policy.eos_ids


def test_an_end_of_sequence_token_is_added_if_the_template_has_none(policy: Policy, prompts: list[Prompt]) -> None:
    template = policy.processor.chat_template
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy.processor, "chat_template", template.replace("</s>", " "))
        assert tokenize_response(policy, prompts[0], "There is a boat.")[-1] == policy.tokenizer.eos_token_id
        without = tokenize_response(policy, prompts[0], "There is a boat.")
    assert without == tokenize_response(policy, prompts[0], "There is a boat.")


def test_a_response_with_an_image_placeholder_is_rejected(policy: Policy, prompts: list[Prompt]) -> None:
    pairs = [
        TextPair(prompts[0], "There is a boat. <image>", "There is a fish."),
        TextPair(prompts[1], "There is a boat.", "There is a fish."),
    ]
    refused, pair = encode_pairs(pairs, policy, 1, RULE)
    assert refused == "placeholder"
    assert pair.prompt == prompts[1]
    assert pair.chosen.logprob < 0
    assert pair.margin == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [("", 0), ("A boat", 1), ("A boat.", 1), ("A boat. A fish.", 2), ("It is 3.5 m. Yes.", 2), ("Dr. Low. And", 2)],
)
def test_sentences_are_counted_as_in_the_search(text: str, number: int) -> None:
    assert count_sentences(text, RULE) == number
