"""Packed pairs: the losses, gradients and metrics are those of TRL's trainer on rows of their own."""

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
from csr_vlm.training.packing import freeze_pictures, num_shared, obstacle, pack, visible
from csr_vlm.world.demo import assets

MODEL = ModelConfig(path=str(assets() / "llava"), device="cpu")
SENTENCES = (
    ("There is a red boat. There is a blue car.", "There is a red boat. There is a green car. There is a tree."),
    ("There is a dog.", "There is a yellow house. There is a dog."),
    ("There is a red boat. There is a fish.", "There is a red boat."),
    ("A red boat.", "There is a blue tree. There is a bird."),
)
"""Chosen and rejected: with shared tokens, with a few, one the beginning of the other, with none."""
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
    """Pairs as a search would make them, with their log-probabilities under the shipped model."""
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
class Both:
    """TRL's trainer and ours, on the same model and the same pairs."""

    stock: Any
    packed: Any
    plain_batch: dict[str, Any]
    packed_batch: dict[str, Any]


def trainer_for(kind: type, pairs: list[Pair], work: Path, training: TrainingConfig = CONFIG) -> tuple[Any, Policy]:
    torch.manual_seed(0)
    policy = trainable_policy(MODEL, training, None)
    noise = torch.Generator().manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        # A fresh adapter's second matrix is zero, and hides the first one's gradient.
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=noise)
    made = kind(
        model=policy.model,
        args=trainer_arguments(training, work, 0, "cpu"),
        train_dataset=Dataset.from_list([training_row(pair) for pair in pairs]),
        data_collator=PairCollator(policy),
        processing_class=policy.processor,
    )
    made.precompute_ref_logps = True
    made.label_smoothing = 0.1
    made.first_loss = 0.0
    return made, policy


@pytest.fixture(scope="module")
def both(pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> Both:
    rows = [training_row(pair) for pair in pairs]
    stock, policy = trainer_for(DPOTrainer, pairs, tmp_path_factory.mktemp("stock"))
    packed, _ = trainer_for(CsrTrainer, pairs, tmp_path_factory.mktemp("packed"))
    return Both(stock, packed, PairCollator(policy)(rows), PairCollator(policy, packing=True)(rows))


def outcome(trainer: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """One batch's loss, gradients and metrics."""
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
def test_every_loss_and_its_gradients_are_trls(both: Both, loss: str) -> None:
    for trainer in (both.stock, both.packed):
        trainer.loss_types, trainer.loss_weights = [loss], [1.0]
    assert_same(outcome(both.packed, both.packed_batch), outcome(both.stock, both.plain_batch))


def test_losses_add_up_and_count_shared_tokens_as_trl_does(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    for trainer in (both.stock, both.packed):
        monkeypatch.setattr(trainer, "loss_types", ["sigmoid", "sft"])
        monkeypatch.setattr(trainer, "loss_weights", [1.0, 0.3])
        monkeypatch.setattr(trainer, "ld_alpha", 0.5)
    assert_same(outcome(both.packed, both.packed_batch), outcome(both.stock, both.plain_batch))


@pytest.mark.parametrize("index", range(len(SENTENCES)))
def test_each_pair_by_itself(both: Both, pairs: list[Pair], index: int, policy: Policy) -> None:
    rows = [training_row(pairs[index])]
    for trainer in (both.stock, both.packed):
        trainer.loss_types, trainer.loss_weights = ["sigmoid", "sft"], [1.0, 1.0]
    batches = [PairCollator(policy, packing=packing)(rows) for packing in (True, False)]
    assert_same(outcome(both.packed, batches[0]), outcome(both.stock, batches[1]))


def test_our_trainer_takes_unpacked_batches_as_trl_does(both: Both) -> None:
    for trainer in (both.stock, both.packed):
        trainer.loss_types, trainer.loss_weights = ["sigmoid"], [1.0]
    ours, stock = outcome(both.packed, both.plain_batch), outcome(both.stock, both.plain_batch)
    assert ours[0] == stock[0]
    assert all(torch.equal(ours[1][name], gradient) for name, gradient in stock[1].items())


def test_a_mask_that_lets_one_side_see_the_other_would_be_noticed(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    for trainer in (both.stock, both.packed):
        trainer.loss_types, trainer.loss_weights = ["sigmoid"], [1.0]
    stock = outcome(both.stock, both.plain_batch)
    causal = torch.ones(both.packed_batch["packed"]["parts"].shape[1:] * 2, dtype=torch.bool).tril()
    monkeypatch.setattr(packing, "visible", lambda parts: causal.expand(len(parts), 1, -1, -1))
    assert abs(outcome(both.packed, both.packed_batch)[0] - stock[0]) > 1e-3


def test_wrong_positions_would_be_noticed(both: Both) -> None:
    for trainer in (both.stock, both.packed):
        trainer.loss_types, trainer.loss_weights = ["sigmoid"], [1.0]
    stock = outcome(both.stock, both.plain_batch)
    packed = dict(both.packed_batch["packed"])
    packed["position_ids"] = torch.arange(packed["parts"].shape[1]).expand_as(packed["parts"])
    assert abs(outcome(both.packed, both.packed_batch | {"packed": packed})[0] - stock[0]) > 1e-3


def test_eager_attention_takes_packed_rows_too(both: Both, pairs: list[Pair], tmp_path: Path) -> None:
    trainer, policy = trainer_for(CsrTrainer, pairs, tmp_path)
    policy.base_model.set_attn_implementation("eager")
    both.stock.loss_types, both.stock.loss_weights = ["sigmoid"], [1.0]
    assert_same(outcome(trainer, both.packed_batch), outcome(both.stock, both.plain_batch))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
        {"gradient_checkpointing": True},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
    ],
    ids=["plain", "accumulated", "checkpointed", "sft"],
)
def test_training_ends_where_it_would_without_packing(pairs: list[Pair], tmp_path: Path, changes: dict) -> None:
    training = CONFIG.model_copy(update={"trl": {**CONFIG.trl, **changes}})
    auto, off = both_ways(pairs, training, tmp_path)
    assert auto["reference"] == off["reference"] == "ledger"
    assert auto["packing_obstacle"] is None


def test_training_against_the_models_own_reference(pairs: list[Pair], tmp_path: Path) -> None:
    training = CONFIG.model_copy(update={"reference": "model"})
    auto, _ = both_ways(pairs, training, tmp_path)
    assert auto["reference"] == "model"


def both_ways(pairs: list[Pair], training: TrainingConfig, where: Path) -> tuple[dict, dict]:
    """Train with and without packing; what comes out must be the same, and must have moved."""
    results, adapters, widths = [], [], []
    for way in ("auto", "off"):
        with pytest.MonkeyPatch.context() as patch:
            seen = watch_widths(patch)
            results.append(
                train(
                    pairs,
                    MODEL,
                    training.model_copy(update={"packing": way}),
                    previous=None,
                    adapter=where / way,
                    work=where / "work",
                    seed=1,
                )
            )
        widths.append(set(seen))
        adapters.append(load_file(where / way / "adapter_model.safetensors"))
    assert [{"packed"}, {"plain"}] == widths
    losses = [[float(entry["loss"]) for entry in result["log"]] for result in results]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[0][0] - losses[0][-1]) > 1e-3
    moved = [name for name in adapters[0] if "lora_B" in name]
    assert all(adapters[1][name].abs().max() > 1e-4 for name in moved)
    for name, tensor in adapters[0].items():
        assert torch.allclose(tensor, adapters[1][name], rtol=1e-4, atol=1e-6), name
    return results[0], results[1]


def watch_widths(patch: pytest.MonkeyPatch) -> list[str]:
    """Note of every batch that reaches the loss whether it is packed."""
    seen: list[str] = []
    original = CsrTrainer._compute_loss

    def watched(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append("packed" if "packed" in inputs else "plain")
        return original(self, model, inputs, *args, **kwargs)

    patch.setattr(CsrTrainer, "_compute_loss", watched)
    return seen


def test_layout_of_a_pair(policy: Policy) -> None:
    prompt = EncodedPrompt(torch.tensor([1, 9, 9, 5]), torch.arange(4), {}, {})
    packed = pack([prompt], [[20, 21, 22]], [[20, 31, 32, 33]], pad_id=0)
    assert packed["input_ids"].tolist() == [[1, 9, 9, 5, 20, 21, 22, 31, 32, 33]]
    assert packed["parts"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 2, 2, 2]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 5, 6, 7]]
    assert packed["targets"].tolist() == [[20, 21, 22, 31, 32, 33]]
    # 21 and 31 are both predicted where 20 stands.
    assert packed["readers"].tolist() == [[3, 4, 5, 4, 7, 8]]
    assert packed["slots"].tolist() == [[0, 1, 2, 0], [0, 3, 4, 5]]
    seen = visible(packed["parts"])[0, 0]
    assert seen[7].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 7]
    assert seen[6].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_shorter_rows_are_padded_and_padding_sees_itself() -> None:
    short = EncodedPrompt(torch.tensor([1, 5]), torch.arange(2), {}, {})
    packed = pack([short, short], [[20, 21], [40]], [[31], [40, 41]], pad_id=0)
    assert packed["parts"].tolist() == [[0, 0, 1, 1, 2], [0, 0, 0, 2, 3]]
    assert packed["targets"].tolist() == [[20, 21, 31], [40, 41, -100]]
    assert visible(packed["parts"]).any(dim=-1).all()


def test_positions_in_three_dimensions_go_on_for_both_sides() -> None:
    positions = torch.tensor([[0, 1, 1, 2], [0, 1, 2, 3], [0, 1, 1, 2]])
    prompt = EncodedPrompt(torch.tensor([1, 9, 9, 5]), positions, {}, {})
    packed = pack([prompt], [[20, 21]], [[20, 31]], pad_id=0)
    assert packed["position_ids"].shape == (3, 1, 7)
    assert packed["position_ids"][0, 0].tolist() == [0, 1, 1, 2, 4, 5, 5]


@pytest.mark.parametrize(
    ("chosen", "rejected", "found"), [([1, 2], [1, 3], 1), ([1, 2], [1, 2, 3], 2), ([2], [1], 0), ([4, 5], [4, 5], 2)]
)
def test_what_both_begin_with(chosen: list[int], rejected: list[int], found: int) -> None:
    assert num_shared(chosen, rejected) == num_shared(rejected, chosen) == found


@pytest.fixture
def other(policy: Policy) -> Iterator[Any]:
    """The model's configuration, to be changed and put back."""
    text = policy.base_model.config.get_text_config()
    kept = dict(text.__dict__)
    yield text
    text.__dict__.clear()
    text.__dict__.update(kept)


def test_rows_beyond_the_attention_window_stay_apart(other: Any, policy: Policy, pairs: list[Pair]) -> None:
    rows = [training_row(pair) for pair in pairs]
    width = PairCollator(policy)(rows)["input_ids"].shape[1]
    for size, packs in ((width, True), (width - 1, False)):
        other.sliding_window = size
        batch = PairCollator(policy, packing=True)(rows)
        assert ("packed" in batch) == packs == ("pixel_values" not in batch)


def test_what_stands_in_the_way_is_said(other: Any, policy: Policy) -> None:
    config = policy.base_model.config
    other._attn_implementation = "sdpa"  # whatever a search before has installed
    assert obstacle(config) is None
    other.layer_types = ["full_attention", "linear_attention"]
    assert "linear_attention" in str(obstacle(config))
    other.layer_types = ["full_attention"]
    other.output_router_logits = False
    assert "experts" in str(obstacle(config))
    other._attn_implementation = "flash_attention_2"
    assert "flash_attention_2" in str(obstacle(config))


def test_an_obstacle_means_plain_rows_and_is_told(
    pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csr_vlm.training.dpo.obstacle", lambda _: "the reason")
    seen = watch_widths(monkeypatch)
    result = train(pairs, MODEL, CONFIG, previous=None, adapter=tmp_path / "a", work=tmp_path / "w", seed=1)
    assert result["packing_obstacle"] == "the reason"
    assert set(seen) == {"plain"}


@pytest.mark.parametrize("frozen", [True, False])
def test_pictures_are_read_once_a_pair_and_without_gradients(pairs: list[Pair], tmp_path: Path, frozen: bool) -> None:
    training = CONFIG.model_copy(update={"trl": {**CONFIG.trl, "gradient_checkpointing": True}})
    trainer, policy = trainer_for(CsrTrainer, pairs, tmp_path, training)
    trainer.model.train()
    policy.base_model.gradient_checkpointing_enable()
    if frozen:
        freeze_pictures(policy.base_model)
    seen = []
    inner = policy.base_model.model
    inner.multi_modal_projector.register_forward_hook(lambda _m, _a, output: seen.append(output))
    batch = PairCollator(policy, packing=True)([training_row(pair) for pair in pairs])
    trainer.compute_loss(trainer.model, batch).backward()
    assert [len(output) for output in seen] == [len(pairs)]
    # Without freezing, checkpointing makes the tower's embeddings ask for gradients.
    assert seen[0].requires_grad is not frozen


def test_a_projector_that_trains_keeps_its_gradients(pairs: list[Pair]) -> None:
    policy = trainable_policy(MODEL, CONFIG.model_copy(update={"projector_learning_rate": 0.1}), None)
    freeze_pictures(policy.base_model)
    inner = policy.base_model.model
    pixels = PairCollator(policy)([training_row(pairs[0])])["pixel_values"]
    features = inner.get_image_features(pixels, return_dict=True).pooler_output[0]
    assert features.requires_grad
    assert not inner.vision_tower(pixels).last_hidden_state.requires_grad
