"""Compare prefix trees with TRL's trainer on unpacked rows: losses, gradients and metrics are the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.stock import stock_batch, stock_trainer
from safetensors.torch import load_file

from csr_vlm.config.schema import TrainingConfig
from csr_vlm.core.records import Pair, Prompt
from csr_vlm.models import prefix_tree
from csr_vlm.models.encoding import EncodedPrompt
from csr_vlm.models.policy import Policy
from csr_vlm.models.prefix_tree import PrefixTree, row_tensors, tree_mask, tree_obstacle
from csr_vlm.training.collator import PairCollator
from csr_vlm.training.dpo import train, trainable_policy, trainer_arguments
from csr_vlm.training.trainer import CsrTrainer
from csr_vlm.training.tree_rows import disable_vision_gradients
from tests.integration.training_setup import MODEL, our_trainer, outcome, response, write_pairs

SENTENCES = (
    ("There is a red boat. There is a blue car.", "There is a red boat. There is a green car. There is a tree."),
    ("There is a dog.", "There is a yellow house. There is a dog."),
    ("There is a red boat. There is a fish.", "There is a red boat."),
    ("A red boat.", "There is a blue tree. There is a bird."),
)
"""Chosen and rejected, with a long common beginning, a short one, one that is all of rejected, and none."""
QUESTION = "Is there a boat in the image?"
LOSSES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft "
    "sigmoid_norm"
).split()
SETTINGS = {"learning_rate": 0.5, "optim": "sgd", "per_device_train_batch_size": 8, "lr_scheduler_type": "constant"}
CONFIG = TrainingConfig.model_validate(
    {"lora": {"r": 4, "alpha": 8}, "trl": {**SETTINGS, "max_steps": 2, "max_grad_norm": 100.0}}
)


@pytest.fixture(scope="module")
def pairs(prompts: list[Prompt], policy: Policy) -> list[Pair]:
    """Build the pairs of two images: four siblings each, and a question about the first image."""
    made = []
    for prompt in prompts[:2]:
        for texts in SENTENCES:
            chosen, rejected = (response(policy, prompt, text) for text in texts)
            made.append(Pair(prompt=prompt, iteration=1, chosen=chosen, rejected=rejected))
    question = Prompt(f"{prompts[0].prompt_id}?0", prompts[0].image, QUESTION)
    sides = [response(policy, question, text) for text in ("Yes.", "No.")]
    return [*made[:4], Pair(prompt=question, iteration=1, chosen=sides[0], rejected=sides[1]), *made[4:]]


def noisy_policy(training: TrainingConfig = CONFIG) -> Policy:
    """Load a policy whose adapter does something."""
    torch.manual_seed(0)
    policy = trainable_policy(MODEL, training, None)
    noise = torch.Generator().manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        # The second matrix of a new adapter is zero, which makes the first one's gradient zero.
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=noise)
    return policy


@dataclass
class Trainers:
    """Hold TRL's trainer and ours, on the same model, and one step of the same pairs."""

    stock: Any
    ours: CsrTrainer
    stock_passes: list[dict[str, Any]]
    passes: list[dict[str, Any]]

    def set_losses(self, losses: list[str], weights: list[float]) -> None:
        for trainer in (self.stock, self.ours):
            trainer.loss_types, trainer.loss_weights = losses, weights


@pytest.fixture(scope="module")
def trainers(pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> Trainers:
    work = tmp_path_factory.mktemp("work")
    stock_policy, policy = noisy_policy(), noisy_policy()
    stock = stock_trainer(stock_policy, trainer_arguments(CONFIG, work, 0, "cpu"))
    ours = our_trainer(policy, pairs, work, CONFIG)
    stock.precompute_ref_logps, ours.first_loss = True, 0.0
    stock.label_smoothing = ours.label_smoothing = 0.1
    passes = PairCollator(policy, CONFIG.max_tokens).passes(pairs)
    return Trainers(stock, ours, [stock_batch(stock_policy, pairs)], passes)


def assert_same(ours: Any, stock: Any) -> None:
    assert ours[0] == pytest.approx(stock[0], rel=1e-5, abs=1e-6)
    assert ours[1].keys() == stock[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in stock[1].values())
    assert largest > 0
    for name, gradient in stock[1].items():
        assert torch.allclose(ours[1][name], gradient, rtol=0, atol=1e-5 * max(largest, 1.0)), name
    ours[2].pop("num_tokens")
    stock[2].pop("num_tokens")
    assert ours[2] == pytest.approx(stock[2], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_and_its_gradients_equal_trls(trainers: Trainers, loss: str) -> None:
    trainers.set_losses([loss], [1.0])
    assert_same(outcome(trainers.ours, trainers.passes), outcome(trainers.stock, trainers.stock_passes))


def test_every_image_and_every_distinct_token_is_computed_once(trainers: Trainers, pairs: list[Pair]) -> None:
    (batch,) = trainers.passes
    assert len(batch["rows"]["pixel_values"]) == 2
    ids = trainers.stock_passes[0]["input_ids"]
    masks = trainers.stock_passes[0]["attention_mask"].bool()
    images = [pair.prompt.image for pair in pairs] * 2
    rows = zip(images, ids, masks, strict=True)
    paths = [(image, *row[mask].tolist()) for image, row, mask in rows]
    distinct = {path[: end + 1] for path in paths for end in range(1, len(path))}
    assert int(batch["attention_mask"].sum()) == len(distinct)
    assert batch["rows"]["input_ids"].numel() <= 1.05 * len(distinct), "padding included"
    assert int(batch["attention_mask"].sum()) < int(masks.sum()) / 4


def test_weighted_losses_and_common_tokens_count_as_in_trl(trainers: Trainers, monkeypatch: pytest.MonkeyPatch) -> None:
    trainers.set_losses(["sigmoid", "sft"], [1.0, 0.3])
    for trainer in (trainers.stock, trainers.ours):
        monkeypatch.setattr(trainer, "ld_alpha", 0.5)
    assert_same(outcome(trainers.ours, trainers.passes), outcome(trainers.stock, trainers.stock_passes))


@pytest.mark.parametrize(("max_tokens", "sharing"), [(1, True), (120, True), (8192, False)])
def test_passes_of_any_size_add_up_to_the_same_step(
    trainers: Trainers, pairs: list[Pair], max_tokens: int, sharing: bool, policy: Policy
) -> None:
    trainers.set_losses(["sigmoid"], [1.0])
    passes = PairCollator(policy, max_tokens, sharing=sharing).passes(pairs)
    assert len(passes) > 1 or not sharing
    expected = outcome(trainers.stock, trainers.stock_passes)
    actual = outcome(trainers.ours, passes)
    per_token = {"entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"}
    for metrics in (actual[2], expected[2]):
        for name in per_token:  # means over the tokens of a pass
            metrics.pop(name)
    assert_same(actual, expected)


def test_each_pair_alone(trainers: Trainers, pairs: list[Pair], policy: Policy) -> None:
    trainers.set_losses(["sigmoid", "sft"], [1.0, 1.0])
    for pair in pairs[:5]:
        passes = PairCollator(policy, CONFIG.max_tokens).passes([pair])
        assert_same(outcome(trainers.ours, passes), outcome(trainers.stock, [stock_batch(policy, [pair])]))


def test_a_mask_that_lets_one_response_attend_to_another_fails(
    trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers.set_losses(["sigmoid"], [1.0])
    stock = outcome(trainers.stock, trainers.stock_passes)
    width = trainers.passes[0]["rows"]["ends"].shape[1]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    monkeypatch.setattr(prefix_tree, "tree_mask", lambda ends: causal.expand(len(ends), 1, -1, -1))
    assert abs(outcome(trainers.ours, trainers.passes)[0] - stock[0]) > 1e-3


def test_wrong_positions_fail(trainers: Trainers) -> None:
    trainers.set_losses(["sigmoid"], [1.0])
    stock = outcome(trainers.stock, trainers.stock_passes)
    (batch,) = trainers.passes
    rows = dict(batch["rows"])
    rows["position_ids"] = torch.arange(rows["ends"].shape[1]).expand_as(rows["ends"])
    assert abs(outcome(trainers.ours, [batch | {"rows": rows}])[0] - stock[0]) > 1e-3


def test_eager_attention_accepts_trees(trainers: Trainers, pairs: list[Pair], tmp_path: Path) -> None:
    policy = noisy_policy()
    trainer = our_trainer(policy, pairs, tmp_path, CONFIG)
    trainer.first_loss, trainer.label_smoothing = 0.0, 0.1
    policy.base_model.set_attn_implementation("eager")
    trainers.set_losses(["sigmoid"], [1.0])
    assert_same(outcome(trainer, trainers.passes), outcome(trainers.stock, trainers.stock_passes))


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_checkpointing": True}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}],
    ids=["default", "checkpointed", "sft"],
)
def test_training_gives_the_same_result_with_and_without_packing(
    pairs: list[Pair], tmp_path: Path, changes: dict
) -> None:
    training = CONFIG.model_copy(update={"trl": {**CONFIG.trl, **changes}})
    auto, off = train_both_ways(pairs, training, tmp_path)
    assert auto["reference"] == off["reference"] == "ledger"
    assert auto["packing_obstacle"] is None


def train_both_ways(pairs: list[Pair], training: TrainingConfig, directory: Path) -> tuple[dict, dict]:
    """Train with and without packing; require the same result, and that training changed something."""
    results, adapters = [], []
    for option in ("auto", "off"):
        settings = training.model_copy(update={"packing": option})
        paths = {"adapter": directory / option, "work": directory / "work"}
        results.append(train(write_pairs(pairs, directory), MODEL, settings, previous=None, seed=1, **paths))
        adapters.append(load_file(directory / option / "adapter_model.safetensors"))
    losses = [[float(entry["loss"]) for entry in result["log"]] for result in results]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[0][0] - losses[0][-1]) > 1e-3
    tokens = [result["log"][-1]["num_tokens"] for result in results]
    assert tokens[0] < tokens[1] / 3
    moved = [name for name in adapters[0] if "lora_B" in name]
    assert all(adapters[1][name].abs().max() > 1e-4 for name in moved)
    for name, tensor in adapters[0].items():
        assert torch.allclose(tensor, adapters[1][name], rtol=1e-4, atol=1e-6), name
    return results[0], results[1]


def prompt_of(ids: list[int], positions: torch.Tensor | None = None) -> EncodedPrompt:
    per_image = {"pixel_values": torch.ones(1, 1)}
    return EncodedPrompt(torch.tensor(ids), torch.arange(len(ids)) if positions is None else positions, {}, per_image)


def test_the_tensors_of_a_tree() -> None:
    prompt = prompt_of([1, 9, 9, 5])
    tree = PrefixTree([9])
    for ids in ([20, 21, 22], [20, 31, 32, 33], [20]):
        tree.add(prompt, ids)
    row = tree.row(is_tree=True)
    assert row.input_ids.tolist() == [1, 9, 9, 5, 20, 21, 22, 31, 32, 33]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 6, 7]
    assert row.ends.tolist() == [10, 10, 10, 10, 10, 7, 7, 10, 10, 10]
    # Both 21 and 31 are predicted by 20.
    assert row.predictors.tolist() == [3, 4, 5, 4, 7, 8]
    assert [indices.tolist() for indices in row.responses] == [[0, 1, 2], [0, 3, 4, 5], [0]]
    mask = tree_mask(row.ends[None])[0, 0]
    assert mask[7].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 7]
    assert mask[6].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_a_question_before_the_image_needs_the_image_again() -> None:
    tree = PrefixTree([9])
    first, second = prompt_of([1, 5, 9, 9, 2]), prompt_of([1, 6, 9, 9, 2])
    tree.add(first, [20])
    tree.add(second, [21])
    row = tree.row(is_tree=True)
    assert row.input_ids.tolist() == [1, 5, 9, 9, 2, 20, 6, 9, 9, 2, 21]
    assert len(row.images) == 2
    with pytest.raises(ValueError, match="different images"):
        tree.add(prompt_of([1, 5, 9, 7, 9]), [20])


def test_padding_attends_to_itself_only() -> None:
    rows = []
    for responses in ([20, 21], [31]), ([40],):
        tree = PrefixTree([9])
        for ids in responses:
            tree.add(prompt_of([1, 9]), ids)
        rows.append(tree.row(is_tree=True))
    batch = row_tensors(rows, pad_id=0)
    assert batch["targets"].tolist() == [[20, 21, 31, 40]]
    assert batch["predictor_index"].tolist() == [[1, 2, 1, 6]]
    mask = tree_mask(batch["ends"])[1, 0]
    assert mask.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]


def test_three_dimensional_positions_continue_on_every_path() -> None:
    positions = torch.tensor([[0, 1, 1, 2], [0, 1, 2, 3], [0, 1, 1, 2]])
    tree = PrefixTree([9])
    for ids in ([20, 21], [20, 31]):
        tree.add(prompt_of([1, 9, 9, 5], positions), ids)
    batch = row_tensors([tree.row(is_tree=True)], pad_id=0)
    assert batch["position_ids"].shape == (3, 1, 7)
    assert batch["position_ids"][0, 0].tolist() == [0, 1, 1, 2, 4, 5, 5]


@pytest.fixture
def text_config(policy: Policy) -> Iterator[Any]:
    """Provide the text configuration of the model, and restore it afterwards."""
    text = policy.base_model.config.get_text_config()
    kept = dict(text.__dict__)
    text._attn_implementation = "sdpa"  # An earlier search may have installed another.
    yield text
    text.__dict__.clear()
    text.__dict__.update(kept)


def test_paths_beyond_the_attention_window_get_rows_of_their_own(
    text_config: Any, policy: Policy, pairs: list[Pair]
) -> None:
    longest = stock_batch(policy, pairs)["input_ids"].shape[1]
    for size, num_separate in ((longest, 0), (longest - 1, 1)):
        text_config.sliding_window = size
        passes = PairCollator(policy, CONFIG.max_tokens).passes(pairs)
        separate = [batch for batch in passes if "attention_mask" in batch["rows"]]
        assert sum(len(batch["prompt_ids"]) for batch in separate) == num_separate


def test_the_obstacles_to_trees(text_config: Any, policy: Policy) -> None:
    config = policy.base_model.config
    assert tree_obstacle(config) is None
    text_config.layer_types = ["full_attention", "linear_attention"]
    assert "linear_attention" in str(tree_obstacle(config))
    text_config.layer_types = ["full_attention"]
    text_config.output_router_logits = False
    assert "experts" in str(tree_obstacle(config))
    text_config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2" in str(tree_obstacle(config))


def test_with_an_obstacle_rows_are_separate_and_the_result_names_it(
    pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("csr_vlm.training.dpo", "csr_vlm.models.policy"):
        monkeypatch.setattr(f"{module}.tree_obstacle", lambda _: "the reason")
    paths = {"adapter": tmp_path / "a", "work": tmp_path / "w"}
    result = train(write_pairs(pairs, tmp_path), MODEL, CONFIG, previous=None, seed=1, **paths)
    assert result["packing_obstacle"] == "the reason"
    tokens = sum(len(response.token_ids) for pair in pairs for response in (pair.chosen, pair.rejected))
    assert result["log"][0]["num_tokens"] > 2 * tokens


@pytest.mark.parametrize("frozen", [True, False])
def test_images_are_encoded_once_per_row_and_without_gradients(
    trainers: Trainers, pairs: list[Pair], tmp_path: Path, frozen: bool
) -> None:
    policy = noisy_policy()
    training = CONFIG.model_copy(update={"trl": {**CONFIG.trl, "gradient_checkpointing": True}})
    trainer = our_trainer(policy, pairs, tmp_path, training)
    trainer.first_loss = 0.0
    trainer.model.train()
    policy.base_model.gradient_checkpointing_enable()
    if frozen:
        disable_vision_gradients(policy.base_model)
    seen = []
    inner = policy.base_model.model
    inner.multi_modal_projector.register_forward_hook(lambda _m, _a, output: seen.append(output))
    trainer.compute_loss(trainer.model, trainers.passes[0]).backward()
    assert [len(output) for output in seen] == [2]
    # Otherwise checkpointing makes the tower's embeddings require gradients.
    assert seen[0].requires_grad is not frozen


def test_a_trained_projector_keeps_its_gradients(pairs: list[Pair]) -> None:
    policy = trainable_policy(MODEL, CONFIG.model_copy(update={"projector_learning_rate": 0.1}), None)
    disable_vision_gradients(policy.base_model)
    inner = policy.base_model.model
    pixels = stock_batch(policy, [pairs[0]])["pixel_values"]
    features = inner.get_image_features(pixels, return_dict=True).pooler_output[0]
    assert features.requires_grad
    assert not inner.vision_tower(pixels).last_hidden_state.requires_grad
