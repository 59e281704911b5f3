"""Compare packed pairs with TRL's trainer on unpacked rows: losses, gradients and metrics are the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from trl import DPOTrainer

from csr_vlm.config.schema import ModelConfig, TrainingConfig
from csr_vlm.core.records import Pair, Prompt, Response
from csr_vlm.models.encoding import EncodedPrompt
from csr_vlm.models.policy import Policy
from csr_vlm.training import packing
from csr_vlm.training.collator import PairCollator, training_row
from csr_vlm.training.dpo import CsrTrainer, train, trainable_policy, trainer_arguments
from csr_vlm.training.packing import (
    common_prefix_length,
    disable_vision_gradients,
    pack,
    packed_attention_mask,
    packing_obstacle,
)
from csr_vlm.world.demo import assets

MODEL = ModelConfig(path=str(assets() / "llava"), device="cpu")
SENTENCES = (
    ("There is a red boat. There is a blue car.", "There is a red boat. There is a green car. There is a tree."),
    ("There is a dog.", "There is a yellow house. There is a dog."),
    ("There is a red boat. There is a fish.", "There is a red boat."),
    ("A red boat.", "There is a blue tree. There is a bird."),
)
"""Chosen and rejected, with a long common beginning, a short one, one that is all of rejected, and none."""
LOSSES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft "
    "sigmoid_norm"
).split()
SETTINGS = {"learning_rate": 0.5, "optim": "sgd", "per_device_train_batch_size": 2, "lr_scheduler_type": "constant"}
CONFIG = TrainingConfig.model_validate(
    {"lora": {"r": 4, "alpha": 8}, "trl": {**SETTINGS, "max_steps": 2, "max_grad_norm": 100.0}}
)


@pytest.fixture(scope="module")
def pairs(prompts: list[Prompt], policy: Policy) -> list[Pair]:
    """Build pairs as a search would, with their log-probabilities under the shipped model."""
    made = []
    for prompt, (chosen, rejected) in zip(prompts, SENTENCES, strict=False):
        sides = [response(policy, prompt, text) for text in (chosen, rejected)]
        made.append(Pair(prompt=prompt, iteration=1, chosen=sides[0], rejected=sides[1]))
    return made


def response(policy: Policy, prompt: Prompt, text: str) -> Response:
    ids = (*policy.tokenizer(text, add_special_tokens=False)["input_ids"], policy.tokenizer.eos_token_id)
    logprob = float(policy.teacher_forced([prompt], [ids])[0].sum())
    return Response("1", ids, logprob, text, num_sentences=text.count("."), reward=0.0, complete=True)


@dataclass
class Trainers:
    """Hold TRL's trainer and ours, on the same model and the same pairs."""

    stock: Any
    packed: Any
    unpacked_batch: dict[str, Any]
    packed_batch: dict[str, Any]


def trainer_for(
    trainer_class: type, pairs: list[Pair], work: Path, training: TrainingConfig = CONFIG
) -> tuple[Any, Policy]:
    torch.manual_seed(0)
    policy = trainable_policy(MODEL, training, None)
    noise = torch.Generator().manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        # The second matrix of a new adapter is zero, which makes the first one's gradient zero.
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=noise)
    trainer = trainer_class(
        model=policy.model,
        args=trainer_arguments(training, work, 0, "cpu"),
        train_dataset=Dataset.from_list([training_row(pair) for pair in pairs]),
        data_collator=PairCollator(policy),
        processing_class=policy.processor,
    )
    trainer.precompute_ref_logps = True
    trainer.label_smoothing = 0.1
    trainer.first_loss = 0.0
    return trainer, policy


@pytest.fixture(scope="module")
def trainers(pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> Trainers:
    rows = [training_row(pair) for pair in pairs]
    stock, policy = trainer_for(DPOTrainer, pairs, tmp_path_factory.mktemp("stock"))
    packed, _ = trainer_for(CsrTrainer, pairs, tmp_path_factory.mktemp("packed"))
    return Trainers(stock, packed, PairCollator(policy)(rows), PairCollator(policy, packing=True)(rows))


def outcome(trainer: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """Compute the loss, the gradients and the metrics of one batch."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients, {key: values[-1] for key, values in trainer._metrics["train"].items()}


def assert_same(ours: Any, stock: Any) -> None:
    assert ours[0] == pytest.approx(stock[0], rel=1e-6, abs=1e-7)
    assert ours[1].keys() == stock[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in stock[1].values())
    assert largest > 0
    for name, gradient in stock[1].items():
        assert torch.allclose(ours[1][name], gradient, rtol=0, atol=1e-5 * max(largest, 1.0)), name
    assert ours[2] == pytest.approx(stock[2], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_and_its_gradients_equal_trls(trainers: Trainers, loss: str) -> None:
    for trainer in (trainers.stock, trainers.packed):
        trainer.loss_types, trainer.loss_weights = [loss], [1.0]
    assert_same(outcome(trainers.packed, trainers.packed_batch), outcome(trainers.stock, trainers.unpacked_batch))


def test_weighted_losses_and_common_tokens_count_as_in_trl(trainers: Trainers, monkeypatch: pytest.MonkeyPatch) -> None:
    for trainer in (trainers.stock, trainers.packed):
        monkeypatch.setattr(trainer, "loss_types", ["sigmoid", "sft"])
        monkeypatch.setattr(trainer, "loss_weights", [1.0, 0.3])
        monkeypatch.setattr(trainer, "ld_alpha", 0.5)
    assert_same(outcome(trainers.packed, trainers.packed_batch), outcome(trainers.stock, trainers.unpacked_batch))


@pytest.mark.parametrize("index", range(len(SENTENCES)))
def test_each_pair_alone(trainers: Trainers, pairs: list[Pair], index: int, policy: Policy) -> None:
    rows = [training_row(pairs[index])]
    for trainer in (trainers.stock, trainers.packed):
        trainer.loss_types, trainer.loss_weights = ["sigmoid", "sft"], [1.0, 1.0]
    batches = [PairCollator(policy, packing=packing)(rows) for packing in (True, False)]
    assert_same(outcome(trainers.packed, batches[0]), outcome(trainers.stock, batches[1]))


def test_our_trainer_computes_unpacked_batches_exactly_as_trl(trainers: Trainers) -> None:
    for trainer in (trainers.stock, trainers.packed):
        trainer.loss_types, trainer.loss_weights = ["sigmoid"], [1.0]
    ours, stock = outcome(trainers.packed, trainers.unpacked_batch), outcome(trainers.stock, trainers.unpacked_batch)
    assert ours[0] == stock[0]
    assert all(torch.equal(ours[1][name], gradient) for name, gradient in stock[1].items())


def test_a_mask_that_lets_one_side_attend_to_the_other_fails(
    trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for trainer in (trainers.stock, trainers.packed):
        trainer.loss_types, trainer.loss_weights = ["sigmoid"], [1.0]
    stock = outcome(trainers.stock, trainers.unpacked_batch)
    causal = torch.ones(trainers.packed_batch["packed"]["segment_ids"].shape[1:] * 2, dtype=torch.bool).tril()
    monkeypatch.setattr(
        packing, "packed_attention_mask", lambda segment_ids: causal.expand(len(segment_ids), 1, -1, -1)
    )
    assert abs(outcome(trainers.packed, trainers.packed_batch)[0] - stock[0]) > 1e-3


def test_wrong_positions_fail(trainers: Trainers) -> None:
    for trainer in (trainers.stock, trainers.packed):
        trainer.loss_types, trainer.loss_weights = ["sigmoid"], [1.0]
    stock = outcome(trainers.stock, trainers.unpacked_batch)
    packed = dict(trainers.packed_batch["packed"])
    packed["position_ids"] = torch.arange(packed["segment_ids"].shape[1]).expand_as(packed["segment_ids"])
    assert abs(outcome(trainers.packed, trainers.packed_batch | {"packed": packed})[0] - stock[0]) > 1e-3


def test_eager_attention_accepts_packed_rows(trainers: Trainers, pairs: list[Pair], tmp_path: Path) -> None:
    trainer, policy = trainer_for(CsrTrainer, pairs, tmp_path)
    policy.base_model.set_attn_implementation("eager")
    trainers.stock.loss_types, trainers.stock.loss_weights = ["sigmoid"], [1.0]
    assert_same(outcome(trainer, trainers.packed_batch), outcome(trainers.stock, trainers.unpacked_batch))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
        {"gradient_checkpointing": True},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
    ],
    ids=["default", "accumulated", "checkpointed", "sft"],
)
def test_training_gives_the_same_result_with_and_without_packing(
    pairs: list[Pair], tmp_path: Path, changes: dict
) -> None:
    training = CONFIG.model_copy(update={"trl": {**CONFIG.trl, **changes}})
    auto, off = train_both_ways(pairs, training, tmp_path)
    assert auto["reference"] == off["reference"] == "ledger"
    assert auto["packing_obstacle"] is None


def test_packed_training_with_the_reference_model(pairs: list[Pair], tmp_path: Path) -> None:
    training = CONFIG.model_copy(update={"reference": "model"})
    auto, _ = train_both_ways(pairs, training, tmp_path)
    assert auto["reference"] == "model"


def train_both_ways(pairs: list[Pair], training: TrainingConfig, directory: Path) -> tuple[dict, dict]:
    """Train with and without packing; require the same result, and that training changed something."""
    results, adapters, kinds = [], [], []
    for packing_option in ("auto", "off"):
        with pytest.MonkeyPatch.context() as patch:
            seen = record_batches(patch)
            results.append(
                train(
                    pairs,
                    MODEL,
                    training.model_copy(update={"packing": packing_option}),
                    previous=None,
                    adapter=directory / packing_option,
                    work=directory / "work",
                    seed=1,
                )
            )
        kinds.append(set(seen))
        adapters.append(load_file(directory / packing_option / "adapter_model.safetensors"))
    assert kinds == [{"packed"}, {"unpacked"}]
    losses = [[float(entry["loss"]) for entry in result["log"]] for result in results]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[0][0] - losses[0][-1]) > 1e-3
    moved = [name for name in adapters[0] if "lora_B" in name]
    assert all(adapters[1][name].abs().max() > 1e-4 for name in moved)
    for name, tensor in adapters[0].items():
        assert torch.allclose(tensor, adapters[1][name], rtol=1e-4, atol=1e-6), name
    return results[0], results[1]


def record_batches(patch: pytest.MonkeyPatch) -> list[str]:
    """Record for every batch that reaches the loss whether it is packed."""
    seen: list[str] = []
    original = CsrTrainer._compute_loss

    def recorded(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append("packed" if "packed" in inputs else "unpacked")
        return original(self, model, inputs, *args, **kwargs)

    patch.setattr(CsrTrainer, "_compute_loss", recorded)
    return seen


def test_packed_tensors_of_a_pair(policy: Policy) -> None:
    prompt = EncodedPrompt(torch.tensor([1, 9, 9, 5]), torch.arange(4), {}, {})
    packed = pack([prompt], [[20, 21, 22]], [[20, 31, 32, 33]], pad_id=0)
    assert packed["input_ids"].tolist() == [[1, 9, 9, 5, 20, 21, 22, 31, 32, 33]]
    assert packed["segment_ids"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 2, 2, 2]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 5, 6, 7]]
    assert packed["targets"].tolist() == [[20, 21, 22, 31, 32, 33]]
    # Both 21 and 31 are predicted by 20.
    assert packed["predictor_index"].tolist() == [[3, 4, 5, 4, 7, 8]]
    assert packed["target_index"].tolist() == [[0, 1, 2, 0], [0, 3, 4, 5]]
    mask = packed_attention_mask(packed["segment_ids"])[0, 0]
    assert mask[7].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 7]
    assert mask[6].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_shorter_rows_are_padded_and_padding_attends_to_itself() -> None:
    short = EncodedPrompt(torch.tensor([1, 5]), torch.arange(2), {}, {})
    packed = pack([short, short], [[20, 21], [40]], [[31], [40, 41]], pad_id=0)
    assert packed["segment_ids"].tolist() == [[0, 0, 1, 1, 2], [0, 0, 0, 2, 3]]
    assert packed["targets"].tolist() == [[20, 21, 31], [40, 41, -100]]
    assert packed_attention_mask(packed["segment_ids"]).any(dim=-1).all()


def test_three_dimensional_positions_continue_on_both_sides() -> None:
    positions = torch.tensor([[0, 1, 1, 2], [0, 1, 2, 3], [0, 1, 1, 2]])
    prompt = EncodedPrompt(torch.tensor([1, 9, 9, 5]), positions, {}, {})
    packed = pack([prompt], [[20, 21]], [[20, 31]], pad_id=0)
    assert packed["position_ids"].shape == (3, 1, 7)
    assert packed["position_ids"][0, 0].tolist() == [0, 1, 1, 2, 4, 5, 5]


@pytest.mark.parametrize(
    ("chosen", "rejected", "length"), [([1, 2], [1, 3], 1), ([1, 2], [1, 2, 3], 2), ([2], [1], 0), ([4, 5], [4, 5], 2)]
)
def test_the_length_of_the_common_prefix(chosen: list[int], rejected: list[int], length: int) -> None:
    assert common_prefix_length(chosen, rejected) == common_prefix_length(rejected, chosen) == length


@pytest.fixture
def text_config(policy: Policy) -> Iterator[Any]:
    """Provide the text configuration of the model, and restore it afterwards."""
    text = policy.base_model.config.get_text_config()
    kept = dict(text.__dict__)
    yield text
    text.__dict__.clear()
    text.__dict__.update(kept)


def test_rows_beyond_the_attention_window_are_not_packed(text_config: Any, policy: Policy, pairs: list[Pair]) -> None:
    rows = [training_row(pair) for pair in pairs]
    width = PairCollator(policy)(rows)["input_ids"].shape[1]
    for size, packs in ((width, True), (width - 1, False)):
        text_config.sliding_window = size
        batch = PairCollator(policy, packing=True)(rows)
        assert ("packed" in batch) == packs == ("pixel_values" not in batch)


def test_the_obstacles_to_packing(text_config: Any, policy: Policy) -> None:
    config = policy.base_model.config
    text_config._attn_implementation = "sdpa"  # An earlier search may have installed another.
    assert packing_obstacle(config) is None
    text_config.layer_types = ["full_attention", "linear_attention"]
    assert "linear_attention" in str(packing_obstacle(config))
    text_config.layer_types = ["full_attention"]
    text_config.output_router_logits = False
    assert "experts" in str(packing_obstacle(config))
    text_config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2" in str(packing_obstacle(config))


def test_with_an_obstacle_rows_are_not_packed_and_the_result_names_it(
    pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csr_vlm.training.dpo.packing_obstacle", lambda _: "the reason")
    seen = record_batches(monkeypatch)
    result = train(pairs, MODEL, CONFIG, previous=None, adapter=tmp_path / "a", work=tmp_path / "w", seed=1)
    assert result["packing_obstacle"] == "the reason"
    assert set(seen) == {"unpacked"}


@pytest.mark.parametrize("frozen", [True, False])
def test_images_are_encoded_once_per_pair_and_without_gradients(
    pairs: list[Pair], tmp_path: Path, frozen: bool
) -> None:
    training = CONFIG.model_copy(update={"trl": {**CONFIG.trl, "gradient_checkpointing": True}})
    trainer, policy = trainer_for(CsrTrainer, pairs, tmp_path, training)
    trainer.model.train()
    policy.base_model.gradient_checkpointing_enable()
    if frozen:
        disable_vision_gradients(policy.base_model)
    seen = []
    inner = policy.base_model.model
    inner.multi_modal_projector.register_forward_hook(lambda _m, _a, output: seen.append(output))
    batch = PairCollator(policy, packing=True)([training_row(pair) for pair in pairs])
    trainer.compute_loss(trainer.model, batch).backward()
    assert [len(output) for output in seen] == [len(pairs)]
    # Otherwise checkpointing makes the tower's embeddings require gradients.
    assert seen[0].requires_grad is not frozen


def test_a_trained_projector_keeps_its_gradients(pairs: list[Pair]) -> None:
    policy = trainable_policy(MODEL, CONFIG.model_copy(update={"projector_learning_rate": 0.1}), None)
    disable_vision_gradients(policy.base_model)
    inner = policy.base_model.model
    pixels = PairCollator(policy)([training_row(pairs[0])])["pixel_values"]
    features = inner.get_image_features(pixels, return_dict=True).pooler_output[0]
    assert features.requires_grad
    assert not inner.vision_tower(pixels).last_hidden_state.requires_grad
