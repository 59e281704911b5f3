"""Test runs that start from an earlier run's or a user's adapter, and pushing adapters to the Hub."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from csr_vlm.cli import push as push_module
from csr_vlm.cli.app import app
from csr_vlm.config.schema import ModelConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Silent
from csr_vlm.generation.self_check import self_check
from csr_vlm.models.checkpoints import file_tensors
from csr_vlm.models.loading import load_base, load_policy
from csr_vlm.pipeline.loop import align
from csr_vlm.store import tables
from csr_vlm.store.run import Run
from csr_vlm.training.dpo import merge, train
from csr_vlm.world.demo import assets
from tests.integration.conftest import small_config
from tests.integration.training_setup import write_pairs

LLAVA = str(assets() / "llava")
SHORT = {
    "iterations": 1,
    "method": {"search": {"max_sentences": 3}, "pairs": {"require_complete": False, "per_prompt": 1}},
    "generation": {"prompts_per_part": 16},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("continuing")
    run = Run.create(root / "run", small_config(root, **SHORT, evaluation={"world": {"num_scenes": 10}}))
    align(run, Silent())
    return run


def continued(run: Run, tmp_path: Path, **model: object) -> Run:
    config = small_config(run.root.parent, **SHORT, model={"path": LLAVA, "device": "cpu", **model})
    again = Run.create(tmp_path / "again", config)
    align(again, Silent())
    return again


def test_a_run_continues_from_the_adapter_of_another(finished: Run, tmp_path: Path) -> None:
    again = continued(finished, tmp_path, adapter=str(finished.root / "adapter"))
    result = again.result(1, "train")
    assert result["reference"] == "ledger"
    assert result["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    # The aligned policy generated, not the base model.
    (part, *_), (old, *_) = again.ledger_parts(1), finished.ledger_parts(1)
    assert [n.token_logprobs for n in tables.read_nodes(part)] != [n.token_logprobs for n in tables.read_nodes(old)]


def test_a_run_continues_from_a_merged_model(finished: Run, tmp_path: Path) -> None:
    merge(finished.config.model, finished.root / "adapter", tmp_path / "model")
    again = continued(finished, tmp_path, path=str(tmp_path / "model"))
    assert again.result(1, "train")["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    from_adapter = continued(finished, tmp_path / "other", adapter=str(finished.root / "adapter"))
    left, right = (list(tables.read_nodes(run.ledger_parts(1)[0])) for run in (again, from_adapter))
    assert [node.token_ids for node in left] == [node.token_ids for node in right]


def user_adapter(where: Path, **settings: object) -> Path:
    model, _ = load_base(ModelConfig(path=LLAVA, device="cpu"))
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, **settings))
    adapted.save_pretrained(where / "adapter")
    return where / "adapter"


def test_a_run_continues_from_a_users_adapter(finished: Run, tmp_path: Path) -> None:
    adapter = user_adapter(tmp_path, r=16, lora_alpha=1, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    config = small_config(
        finished.root.parent,
        **SHORT,
        model={"path": LLAVA, "device": "cpu", "adapter": str(adapter)},
        training={"lora": {"r": 16, "alpha": 1}, "trl": {"num_train_epochs": 1, "per_device_train_batch_size": 4}},
    )
    run = Run.create(tmp_path / "run", config)
    align(run, Silent())
    assert run.result(1, "train")["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    saved = json.loads((run.root / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (saved["r"], saved["lora_alpha"]) == (16, 1)


def test_adapters_that_do_not_fit_are_rejected(finished: Run, tmp_path: Path) -> None:
    pairs = list(tables.read_pairs(finished.pairs_path(1)))
    config = finished.config

    def attempt(previous: Path) -> None:
        train(
            write_pairs(pairs, tmp_path),
            config.model,
            config.training,
            previous=previous,
            adapter=tmp_path / "x",
            work=tmp_path / "w",
            seed=0,
        )

    with pytest.raises(CsrError, match="there is no adapter"):
        attempt(tmp_path / "nowhere")
    with pytest.raises(CsrError, match=r"rank 4 and alpha 8"):
        attempt(user_adapter(tmp_path / "a", r=4, lora_alpha=8, target_modules=r".*language_model.*\.q_proj"))
    with pytest.raises(CsrError, match="outside the language model"):
        attempt(user_adapter(tmp_path / "b", r=16, lora_alpha=32, target_modules=r".*\.q_proj"))
    renamed = tmp_path / "c" / "adapter"
    shutil.copytree(finished.root / "adapter", renamed)
    settings = json.loads((renamed / "adapter_config.json").read_text(encoding="utf-8"))
    settings["target_modules"] = r".*language_model.*\.q_proj"
    (renamed / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(CsrError, match="names do not match"):
        load_policy(config.model, renamed)


def test_a_reference_that_is_not_the_policy_stops_training(finished: Run, tmp_path: Path) -> None:
    config = finished.config
    pairs = [
        replace(p, chosen=replace(p.chosen, logprob=p.chosen.logprob - 5.0))
        for p in tables.read_pairs(finished.pairs_path(1))
    ]
    # The check of sixteen pairs before training is replaced by one that passes.
    blind = config.training.model_copy(update={"reference_tolerance": 5.5})
    paths = {"previous": None, "adapter": tmp_path / "adapter", "work": tmp_path / "work"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("csr_vlm.training.dpo.verify_reference", lambda *_: (0.0, True))
        with pytest.raises(CsrError, match="not log 2"):
            train(write_pairs(pairs, tmp_path), config.model, config.training, seed=0, **paths)
        result = train(write_pairs(pairs, tmp_path), config.model, blind, seed=0, **paths)
    # -log sigmoid(beta * 5), beta 0.1.
    assert result["first_loss"] == pytest.approx(math.log(1 + math.exp(-0.5)), abs=1e-3)


def test_the_self_check_accepts_the_shipped_model_and_rejects_wrong_positions(
    finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(finished.config.model, None)
    prompt = next(finished.prompts())
    assert self_check(policy, prompt) < 1e-4
    monkeypatch.setattr(type(policy), "step_positions", lambda _, positions: (positions + 7)[:, None])
    with pytest.raises(CsrError, match="generation and teacher forcing differ"):
        self_check(policy, prompt)


def test_a_plain_merge_has_tensor_names_as_published(finished: Run, tmp_path: Path) -> None:
    """vLLM knows only these names; the adapter's folder is all that a user needs beside the base model."""
    model = AutoModelForImageTextToText.from_pretrained(LLAVA)
    adapter = str(finished.root / "adapter")
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(adapter).save_pretrained(tmp_path)
    names = file_tensors(tmp_path / "model.safetensors").keys()
    assert names == file_tensors(Path(LLAVA) / "model.safetensors").keys() - {"language_model.lm_head.weight"}, "tied"
    assert {name.split(".")[1] for name in names if name.startswith("vision_tower.")} == {"vision_model"}
    assert (tmp_path / "processor_config.json").is_file()


def test_the_card_says_what_the_adapter_is(finished: Run) -> None:
    card = (finished.root / "adapter" / "README.md").read_text(encoding="utf-8")
    _, header, text = card.split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert "base_model" not in metadata, "the base model is a folder"
    assert str(Path(LLAVA).parent) not in card, "no paths of this machine"
    (model,) = metadata["model-index"]
    (chair_s,) = [result["metrics"][0] for result in model["results"] if result["metrics"][0]["type"] == "chair_s"]
    assert chair_s["value"] == pytest.approx(finished.result(1, "evaluate")["world"]["chair_s"]["value"], abs=1e-6)
    assert "@inproceedings{zhou2024calibrated" in text
    assert "Each pair compares two" in text
    assert "PeftModel.from_pretrained" in text
    metrics = finished.result(1, "evaluate")["world"]["chair_s"]
    row = next(line for line in text.splitlines() if line.startswith("| CHAIR_S"))
    assert f"{metrics['value']:.3f} [{metrics['low']:.3f}, {metrics['high']:.3f}]" in row
    assert "lambda: 0.9" in text


def test_the_license_of_the_base_model_is_on_the_card(tmp_path: Path) -> None:
    from csr_vlm.report.card import base_license

    assert base_license(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: llama2\nlanguage: en\n---\n# A model\n", encoding="utf-8")
    assert base_license(str(tmp_path)) == "llama2"
    (tmp_path / "README.md").write_text("---\n: [\n---\n", encoding="utf-8")
    assert base_license(str(tmp_path)) is None


def test_a_dry_run_shows_what_would_be_sent(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_module._Upload, "send", lambda *_: pytest.fail("something was sent"))
    shown = CliRunner().invoke(
        app, ["push", str(finished.root), "me/llava-csr", "--dry-run", "--base-model", "org/llava"]
    )
    assert shown.exit_code == 0
    for expected in (
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
        "processor_config.json",
        "base_model: org/llava",
        "nothing was uploaded",
    ):
        assert expected in shown.output


def test_a_push_sends_the_adapters_folder(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = {}

    class Api:
        def whoami(self) -> dict[str, object]:
            return {"name": "me", "orgs": [{"name": "ours"}], "auth": {"accessToken": {"role": "write"}}}

        def create_repo(self, name: str, **options: object) -> None:
            sent["repository"] = (name, options)

        def upload_folder(self, **options: object) -> object:
            sent["options"], folder = options, Path(str(options["folder_path"]))
            sent["files"] = {path.name: path.read_bytes() for path in folder.iterdir()}
            return type("Commit", (), {"commit_url": "https://hub/commit/1"})()

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    shown = CliRunner().invoke(app, ["push", str(finished.root), "me/llava-csr", "--private"])
    assert shown.stdout.strip() == "https://hub/commit/1"
    assert sent["repository"] == ("me/llava-csr", {"repo_type": "model", "private": True, "exist_ok": True})
    assert sent["files"].keys() == {path.name for path in (finished.root / "adapter").iterdir()}
    assert not [name for name, content in sent["files"].items() if str(Path(LLAVA).parent).encode() in content]
    weights = "adapter_model.safetensors"
    assert sent["files"][weights] == (finished.root / "adapter" / weights).read_bytes()
    shown = CliRunner().invoke(app, ["push", str(finished.root), "ours/pairs", "--pairs"])
    assert shown.stdout.strip() == "https://hub/commit/1"
    assert sent["repository"] == ("ours/pairs", {"repo_type": "dataset", "private": False, "exist_ok": True})
    assert sent["files"].keys() == {"pairs.parquet", "README.md"}
    sent.clear()
    other = CliRunner().invoke(app, ["push", str(finished.root), "someone/llava-csr"])
    assert "me cannot write to someone" in str(other.exception)
    assert not sent, "no repository was created"
    bad = CliRunner().invoke(app, ["push", str(finished.root), "not a name"])
    assert isinstance(bad.exception, CsrError)
