"""Skip these tests where vLLM is not installed; make test-vllm runs them in a separate environment."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from csr_vlm.config.schema import GenerationConfig, ModelConfig
from csr_vlm.core.records import Prompt
from csr_vlm.models.checkpoints import rename_as_published
from csr_vlm.models.encoding import PromptEncoder
from csr_vlm.models.loading import load_base, load_policy, load_prompt_encoder
from csr_vlm.models.policy import Policy
from csr_vlm.training.dpo import LINEAR_LAYERS, save_adapter
from csr_vlm.world.dataset import write_images
from csr_vlm.world.demo import assets
from csr_vlm.world.scenes import HARBOUR, Split, make_scenes

# For vLLM on a CPU; its workers' threads stay where the tests' are.
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}

ENGINE = {"engine": "vllm", "vllm": {"enforce_eager": True, "block_size": 32}}
"""Eager mode, since compiling takes longer than the tests; a small block, since the default is longer than a prompt."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if util.find_spec("vllm") is None:
        skip = pytest.mark.skip(reason="vLLM is not installed; make test-vllm has an environment with it")
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """Write the embedded world's LLaVA as vLLM reads it."""
    path = tmp_path_factory.mktemp("model") / "llava"
    shutil.copytree(assets() / "llava", path)
    rename_as_published(path)
    return ModelConfig(path=str(path), device="cpu")


@pytest.fixture(scope="session")
def policy(llava: ModelConfig) -> Policy:
    return load_policy(llava, adapter=None)


@pytest.fixture(scope="session")
def prompt_encoder(llava: ModelConfig) -> PromptEncoder:
    return load_prompt_encoder(llava)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    """Write images that no model was trained on."""
    return write_images(list(make_scenes(HARBOUR, Split.DEVELOPMENT, 0, 8)), tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def adapters(llava: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write two LoRAs that change the responses, and one that includes a projector."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "other", "projector")):
        torch.manual_seed(seed)
        saved = ["multi_modal_projector"] if name == "projector" else None
        lora = LoraConfig(
            r=4, lora_alpha=8, target_modules=rf".*\blanguage_model\b.*\.{LINEAR_LAYERS}", modules_to_save=saved
        )
        model = get_peft_model(load_base(llava)[0], lora)
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, std=0.05)
        save_adapter(model, model.state_dict(), root / name)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def vllm(llava: ModelConfig, adapters: dict[str, Path]) -> Iterator[Any]:
    """Start an engine that accepts adapters."""
    from csr_vlm.generation.vllm import vllm_engine

    with vllm_engine(llava, GenerationConfig.model_validate(ENGINE), adapters["one"]) as engine:
        yield engine
