"""Run every family through the whole method: search, log-probabilities, DPO, adapter, merge.

The checkpoints are tiny and untrained (see checkpoints.py). The tests check that all parts encode
prompts, images and responses of a family in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from benchmarks.stock import stock_batch, stock_trainer
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from csr_vlm.config.schema import MethodConfig, ModelConfig, ScorerConfig, TrainingConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Finish, Pair, Prompt
from csr_vlm.generation.self_check import logprobs_from_pixels, self_check
from csr_vlm.generation.transformers_engine import TransformersEngine
from csr_vlm.method.pairs import make_pairs
from csr_vlm.method.search import Tree, search
from csr_vlm.models import passes
from csr_vlm.models.adapters import AdapterSwitch
from csr_vlm.models.checkpoints import checkpoint_tensors
from csr_vlm.models.families import FAMILIES as KNOWN_FAMILIES
from csr_vlm.models.families import Family
from csr_vlm.models.loading import load_policy
from csr_vlm.models.policy import Policy
from csr_vlm.models.prefix_tree import tree_obstacle
from csr_vlm.playground.answering import Sampling, stream_answer
from csr_vlm.scoring.registry import load_scorer
from csr_vlm.training import dpo
from csr_vlm.training.collator import PairCollator
from csr_vlm.world.demo import assets
from tests.families.checkpoints import FAMILIES, checkpoint
from tests.integration.training_setup import our_trainer, outcome, write_pairs

SIZES = ((72, 72), (90, 48), (40, 64))
"""(width, height) of the images; in many families they differ in tiles and token counts."""
METHOD = MethodConfig.model_validate(
    {
        "search": {"num_candidates": 4, "max_sentences": 2, "max_sentence_tokens": 12},
        "pairs": {"require_complete": False},
    }
)
TRAINING = TrainingConfig.model_validate(
    {
        "lora": {"r": 2, "alpha": 4},
        "trl": {"learning_rate": 1e-3, "per_device_train_batch_size": 2, "max_steps": 2},
    }
)
TOLERANCE = 1e-4
"""Nats per response; responses have up to 24 tokens of about -5 nats each."""


@dataclass
class Case:
    """Hold what a family's tests share: one search, one training, one merge."""

    config: ModelConfig
    policy: Policy
    prompts: list[Prompt]
    trees: list[Tree]
    pairs: list[Pair]
    trained: dict[str, torch.Tensor]
    """Parameters of the model after training, by name."""
    result: dict[str, Any]
    adapter: Path
    directory: Path


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with TemporaryDirectory() as path:
        yield Path(path)


@cache
def prompts(directory: Path) -> list[Prompt]:
    prompts = []
    for number, (width, height) in enumerate(SIZES):
        noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(number))
        path = directory / f"{number}.png"
        Image.fromarray(noise.byte().numpy()).save(path)
        prompts.append(Prompt(str(number), str(path), ("Describe this image.", "What is here?")[number % 2]))
    return prompts


def model_of(name: str) -> ModelConfig:
    try:
        path = str(checkpoint(name))
        AutoProcessor.from_pretrained(path)
    except ImportError as error:
        pytest.skip(f"the processor cannot be built here: {str(error).strip().splitlines()[0]}")
    return ModelConfig(path=path, device="cpu")


@cache
def case(name: str, directory: Path) -> Case:
    config = model_of(name)
    torch.set_num_threads(1)
    policy = load_policy(config, None)
    asked = prompts(directory)
    engine = TransformersEngine(policy)
    scorer = load_scorer(ScorerConfig(path=str(assets() / "clip")), device="cpu")
    trees = search(
        asked,
        lambda requests: engine.propose(requests, METHOD.search),
        scorer.score,
        METHOD,
        iteration=1,
        seed=0,
        scorer="clip",
    )
    made = [make_pairs(tree.prompt, tree.nodes, METHOD, "clip", 0) for tree in trees]
    pairs = [pair for result in made if not isinstance(result, str) for pair in result]
    adapter = directory / name / "adapter"
    trained, result = trained_on(pairs, config, adapter, previous=None)
    return Case(config, policy, asked, trees, pairs, trained, result, adapter, directory / name)


def trained_on(
    pairs: Sequence[Pair], config: ModelConfig, adapter: Path, previous: Path | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Train two steps; return all parameters after training, and the result of training."""
    kept: dict[str, torch.Tensor] = {}
    save = dpo.save_adapter

    def keep_and_save(model: Any, weights: Any, directory: Path, processor: Any = None) -> None:
        kept.update({key: value.detach().clone() for key, value in model.named_parameters()})
        save(model, weights, directory, processor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo, "save_adapter", keep_and_save)
        result = dpo.train(
            write_pairs(pairs, adapter.parent),
            config,
            TRAINING,
            previous=previous,
            adapter=adapter,
            work=adapter.with_name("work"),
            seed=0,
        )
    return kept, result


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, directory: Path) -> Case:
    return case(request.param, directory)


def logprobs(policy: Policy, case: Case) -> torch.Tensor:
    """Return the log-probabilities of the chosen responses, concatenated."""
    policy.model.eval()
    asked = [pair.prompt for pair in case.pairs]
    return torch.cat(policy.teacher_forced(asked, [pair.chosen.token_ids for pair in case.pairs]))


def test_the_checkpoints_cover_all_known_families() -> None:
    built = {checkpoint_type(name) for name in FAMILIES}
    assert set(KNOWN_FAMILIES) <= built
    assert len(FAMILIES) >= 12


def test_the_docs_page_lists_every_family() -> None:
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    assert all(f"| {name} | `{checkpoint_type(name)}` |" in page for name in FAMILIES)


@pytest.mark.parametrize(
    ("name", "error"),
    [("llava_next", None), ("qwen2_vl", "teacher forcing differ"), ("paligemma", "cannot be used for generation")],
)
def test_an_unknown_family_is_rejected_only_if_the_self_check_fails(
    name: str, error: str | None, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(model_of(name), None)
    monkeypatch.setattr("csr_vlm.models.encoding.family_of", lambda _: Family())
    prompt = prompts(directory)[1]
    if error is None:
        assert self_check(policy, prompt) < TOLERANCE
    else:
        with pytest.raises(CsrError, match=error):
            self_check(policy, prompt)


def checkpoint_type(name: str) -> str:
    return {"llava_clip": "llava", "llava_siglip": "llava", "pixtral": "llava"}.get(name, name)


def test_search_extends_its_sentences_and_scores_them(family: Case) -> None:
    nodes = [node for tree in family.trees for node in tree.nodes]
    assert {node.depth for node in nodes} == {1, 2}
    assert all(
        node.finish is Finish.DELIMITER
        for node in nodes
        for child in nodes
        if child.parent_id == node.node_id and child.prompt_id == node.prompt_id
    )
    scored = [node for node in nodes if node.sentence]
    assert scored
    assert all(-1.0 <= node.cosines["clip"] <= 1.0 for node in scored)
    assert not {token for node in nodes for token in node.token_ids} & set(family.policy.image_token_ids)
    assert len(family.pairs) >= 2


def test_generated_logprobs_equal_teacher_forced_ones(family: Case) -> None:
    responses = [response for pair in family.pairs for response in (pair.chosen, pair.rejected)]
    asked = [pair.prompt for pair in family.pairs for _ in range(2)]
    ids = [response.token_ids for response in responses]
    together = family.policy.teacher_forced(asked, ids)
    for prompt, response, forced in zip(asked, responses, together, strict=True):
        assert abs(float(forced.sum()) - response.logprob) < TOLERANCE
        alone = logprobs_from_pixels(family.policy, prompt, response.token_ids)
        assert abs(float(alone.sum()) - response.logprob) < TOLERANCE
    assert self_check(family.policy, asked[0]) < TOLERANCE
    pictures = [prompt.image for prompt in family.prompts]
    swapped = [replace(p, image=pictures[(pictures.index(p.image) + 1) % len(pictures)]) for p in asked]
    wrong = family.policy.teacher_forced(swapped, ids)
    assert all(
        abs(float(forced.sum()) - response.logprob) > 100 * TOLERANCE
        for response, forced in zip(responses, wrong, strict=True)
    )


def test_adapters_are_switched_in_one_model_and_answers_stream(family: Case) -> None:
    switch = AdapterSwitch(family.config, {"base": None, "trained": family.adapter})
    asked, response = family.prompts[0], family.trees[0].nodes[0].token_ids
    for name, adapter in (("trained", family.adapter), ("base", None), ("trained", family.adapter)):
        with switch.using(name) as policy:
            ours = policy.teacher_forced([asked], [response])[0]
            *_, streamed = stream_answer(policy, asked, Sampling(max_new_tokens=8))
        expected = load_policy(family.config, adapter)
        assert torch.allclose(ours, expected.teacher_forced([asked], [response])[0], atol=TOLERANCE)
        answer = TransformersEngine(expected).respond([asked], 8)[0]
        whole = expected.tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip()
        assert streamed == whole


def test_dpo_moves_only_the_language_models_adapter(family: Case) -> None:
    assert family.result["reference"] == "ledger"
    assert family.result["reference_difference"] < TOLERANCE
    assert family.result["first_loss"] == pytest.approx(math.log(2), abs=TOLERANCE)
    base = dict(family.policy.base_model.named_parameters())
    moved = set()
    for name, after in family.trained.items():
        if "lora_" in name:
            if ".default" in name and "lora_B" in name and after.abs().sum() > 0:
                moved.add(name)
            continue
        original = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(after, base[original]), f"{name} moved"
    linears = [name for name in family.trained if ".default" in name and "lora_B" in name]
    assert moved == set(linears)
    assert all(".language_model." in name or ".text_model." in name for name in linears)
    assert not any("vision" in name or "visual" in name for name in linears)
    # Seven linear maps in each of two layers.
    assert len(linears) == 14


def test_trees_have_the_loss_and_gradients_of_stock_trl(
    family: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare trees as they are arranged, and all in one row, the last image first."""
    policy, stock_policy = (dpo.trainable_policy(family.config, TRAINING, family.adapter) for _ in range(2))
    has_obstacle = tree_obstacle(policy.base_model.config) is not None
    assert has_obstacle == (policy.base_model.config.model_type in {"gemma3", "paligemma"})
    assert (family.result["packing_obstacle"] is not None) == has_obstacle
    if has_obstacle:
        assert "causal attention" in family.result["packing_obstacle"]
    pairs = [branching(pair, common) for pair, common in zip(family.pairs, (0, 1, 3), strict=False)]
    asked = replace(pairs[0].prompt, prompt_id="asked", text="Is there a dog?")
    pairs = [replace(pairs[0], prompt=asked), *pairs]
    ours = our_trainer(policy, pairs, tmp_path, TRAINING)
    stock = stock_trainer(stock_policy, dpo.trainer_arguments(TRAINING, tmp_path, 0, "cpu"))
    stock.precompute_ref_logps, ours.first_loss = True, 0.0
    expected_loss, expected, expected_metrics = outcome(stock, [stock_batch(stock_policy, pairs)])
    assert abs(expected_loss - math.log(2)) > 1e-3
    trained = {name for name in expected if ".ref." not in name}
    largest = max(float(expected[name].abs().max()) for name in trained)
    collator = PairCollator(policy, TRAINING.max_tokens)
    arranged = collator.passes(pairs)
    monkeypatch.setattr(passes, "row_groups", lambda lengths: [list(range(len(lengths)))[::-1]])
    in_one_row = collator.passes(pairs)
    assert has_obstacle or len(in_one_row[0]["rows"]["input_ids"]) == 1
    for step in (arranged, in_one_row):
        loss, gradients, metrics = outcome(ours, step)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert gradients.keys() == trained
        assert all(
            torch.allclose(gradients[name], expected[name], rtol=0, atol=1e-5 * max(largest, 1.0)) for name in trained
        )
        if not has_obstacle:
            assert metrics["num_tokens"] < 0.7 * expected_metrics["num_tokens"]
    print(f"{len(arranged[0]['rows']['input_ids'])} rows for {len(family.prompts)} images")


def branching(pair: Pair, common: int) -> Pair:
    """Make both sides begin with the same tokens, and change the reference so that the loss is not log 2."""
    rejected = replace(pair.rejected, token_ids=pair.chosen.token_ids[:common] + pair.rejected.token_ids[common:])
    return replace(pair, rejected=replace(rejected, logprob=pair.chosen.logprob - 3.0))


def test_the_saved_adapter_restores_the_trained_policy(family: Case) -> None:
    started = dpo.trainable_policy(family.config, TRAINING, family.adapter)
    for name, value in started.model.named_parameters():
        assert torch.equal(value, family.trained[name])
    reloaded = logprobs(load_policy(family.config, family.adapter), family)
    assert torch.allclose(logprobs(started, family), reloaded, atol=TOLERANCE)
    assert not torch.allclose(logprobs(family.policy, family), reloaded, atol=TOLERANCE)


def test_the_second_iteration_starts_from_the_first_adapter(family: Case, tmp_path: Path) -> None:
    policy = load_policy(family.config, family.adapter)

    def with_logprobs(responses: list[Any]) -> list[Any]:
        logprobs = policy.teacher_forced([pair.prompt for pair in family.pairs], [r.token_ids for r in responses])
        return [replace(r, logprob=float(lp.sum())) for r, lp in zip(responses, logprobs, strict=True)]

    chosen = with_logprobs([pair.chosen for pair in family.pairs])
    rejected = with_logprobs([pair.rejected for pair in family.pairs])
    pairs = [replace(p, chosen=c, rejected=r) for p, c, r in zip(family.pairs, chosen, rejected, strict=True)]
    _, result = trained_on(pairs, family.config, tmp_path / "adapter", previous=family.adapter)
    assert result["reference"] == "ledger"
    assert result["first_loss"] == pytest.approx(math.log(2), abs=TOLERANCE)
    before, after = (load_file(where / "adapter_model.safetensors") for where in (family.adapter, tmp_path / "adapter"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_merged_model_equals_the_adapted_policy(family: Case) -> None:
    merged = family.directory / "model"
    dpo.merge(family.config, family.adapter, merged)
    AutoModelForImageTextToText.from_pretrained(merged)
    tower = family.policy.base_model.config.vision_config.model_type
    if tower in ("clip_vision_model", "siglip_vision_model"):  # the names that other programs need
        assert {name.split(".")[1] for name in checkpoint_tensors(merged) if name.startswith("vision_tower.")} <= {
            "vision_model"
        }
    plain = load_policy(ModelConfig(path=str(merged), device="cpu"), None)
    adapted = load_policy(family.config, family.adapter)
    assert torch.allclose(logprobs(plain, family), logprobs(adapted, family), atol=TOLERANCE)
