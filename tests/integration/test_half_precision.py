"""Check the layers that replace PEFT's adapters and the norms while a half-precision policy generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from csr_vlm.config.schema import ModelConfig, SearchConfig
from csr_vlm.core.records import Prompt
from csr_vlm.generation.half_precision import TOLERANCE, prepare_half_precision
from csr_vlm.generation.transformers_engine import TransformersEngine
from csr_vlm.models import decoding_layers
from csr_vlm.models.decoding_layers import FusedRmsNorm, PlainLora, use_fused_norms, use_plain_lora
from csr_vlm.models.loading import load_policy
from csr_vlm.models.policy import Policy
from csr_vlm.world.demo import assets
from tests.integration.test_engine import expansions


def adapted(scale: float = 1.0, **options: Any) -> Any:
    """Return three linear layers with adapters that are not zero."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 8, bias=False))
    model = get_peft_model(layers, LoraConfig(r=4, lora_alpha=12, target_modules=["0", "2"], **options)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    return model


@torch.no_grad()
def test_a_plain_adapter_computes_what_peft_computes() -> None:
    model, inputs = adapted(), torch.randn(2, 5, 16)
    expected, without = model(inputs), model.get_base_model()[0].base_layer(inputs)
    undo = use_plain_lora(model, torch.float32)
    assert [type(layer) for layer in model.get_base_model()] == [PlainLora, torch.nn.ReLU, PlainLora]
    assert (model(inputs) - expected).abs().max() < 1e-4
    assert (model.get_base_model()[0](inputs) - without).abs().max() > 0.1
    undo()
    assert torch.equal(model(inputs), expected)


@pytest.mark.parametrize("kind", ["dora", "bias", "disabled", "two adapters", "embedding"])
def test_other_adapters_are_left_alone(kind: str) -> None:
    model = adapted(use_dora=kind == "dora", lora_bias=kind == "bias")
    if kind == "disabled":
        model.base_model.disable_adapter_layers()
    if kind == "two adapters":
        model.add_adapter("other", LoraConfig(r=2, target_modules=["0", "2"]))
        model.base_model.set_adapter(["default", "other"])
    if kind == "embedding":
        table = torch.nn.Sequential(torch.nn.Embedding(5, 4))
        model = get_peft_model(table, LoraConfig(r=2, target_modules=["0"]))
    before = [type(module) for module in model.modules()]
    use_plain_lora(model, torch.float32)
    assert [type(module) for module in model.modules()] == before


@torch.no_grad()
def test_norms_are_fused_only_where_the_formula_is_the_same() -> None:
    norms = torch.nn.Sequential(LlamaRMSNorm(16), Qwen2RMSNorm(16), Gemma3RMSNorm(16), torch.nn.LayerNorm(16))
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    inputs = torch.randn(3, 16)
    expected = [norm(inputs) for norm in norms]
    undo = use_fused_norms(norms)
    # Gemma multiplies by 1 + weight.
    assert [type(norm) for norm in norms] == [FusedRmsNorm, FusedRmsNorm, Gemma3RMSNorm, torch.nn.LayerNorm]
    for norm, values in zip(norms, expected, strict=True):
        assert (norm(inputs) - values).abs().max() < 1e-5
    undo()
    assert isinstance(norms[0], LlamaRMSNorm)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save an adapter that changes the shipped model."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("adapter")
    policy = load_policy(ModelConfig(path=str(assets() / "llava"), device="cpu"), None)
    pattern = r".*language_model.*(q|k|v|o|gate|up|down)_proj"
    model = get_peft_model(policy.base_model, LoraConfig(r=8, lora_alpha=16, target_modules=pattern))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    return path


def load(adapter: Path) -> Policy:
    return load_policy(ModelConfig(path=str(assets() / "llava"), device="cpu", dtype="bfloat16"), adapter)


def num_plain(policy: Policy) -> int:
    return sum(isinstance(module, PlainLora) for module in policy.model.modules())


def test_a_policy_generates_with_its_adapter_in_its_own_data_type(adapter: Path, prompts: list[Prompt]) -> None:
    policy, trained, log = load(adapter), load(adapter), list[str]()
    prepare_half_precision(policy, prompts[0], log.append)
    assert num_plain(policy) == 7 * policy.base_model.get_decoder().config.num_hidden_layers
    assert "adapter in bfloat16 beside the weights" in log[0]
    (candidates,) = TransformersEngine(policy).propose(expansions(prompts[:1]), SearchConfig(max_sentence_tokens=12))
    (forced,) = trained.teacher_forced(prompts[:1], [candidates[0].token_ids])
    difference = (forced - torch.tensor(candidates[0].token_logprobs)).abs().mean()
    (base,) = load_policy(
        ModelConfig(path=str(assets() / "llava"), device="cpu", dtype="bfloat16"), None
    ).teacher_forced(prompts[:1], [candidates[0].token_ids])
    assert difference < TOLERANCE < (base - forced).abs().mean(), "the adapter matters, its data type does not"


def test_an_adapter_that_changes_log_probabilities_is_not_used(
    adapter: Path, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = decoding_layers._plain_lora

    def wrong(module: torch.nn.Module, dtype: torch.dtype) -> PlainLora | None:
        plain = real(module, dtype)
        if plain is not None:
            plain.up.data *= -1
        return plain

    monkeypatch.setattr(decoding_layers, "_plain_lora", wrong)
    policy, log = load(adapter), list[str]()
    prepare_half_precision(policy, prompts[0], log.append)
    assert num_plain(policy) == 0
    assert "generating with the layers of training" in log[0]


def test_nothing_is_replaced_in_float32(policy: Policy, prompts: list[Prompt]) -> None:
    log = list[str]()
    prepare_half_precision(policy, prompts[0], log.append)
    assert (num_plain(policy), log) == (0, [])
