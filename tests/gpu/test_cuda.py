"""Test what needs a CUDA device; skipped elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from csr_vlm.config.schema import ModelConfig, SearchConfig, TrainingConfig
from csr_vlm.core.records import Expansion, Pair, Response
from csr_vlm.generation.transformers_engine import TransformersEngine
from csr_vlm.models.loading import load_policy
from csr_vlm.training.dpo import train
from csr_vlm.world.dataset import write_images
from csr_vlm.world.demo import assets
from csr_vlm.world.scenes import HARBOUR, Split, make_scenes
from tests.integration.training_setup import write_pairs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MODEL = str(assets() / "llava")


@pytest.fixture
def requests(tmp_path: Path) -> list[Expansion]:
    prompts = write_images(list(make_scenes(HARBOUR, Split.DEVELOPMENT, 0, 8)), tmp_path)
    return [Expansion(p, "", (), 4, (0, p.prompt_id, 1, "")) for p in prompts]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.3)])
def test_logprobs_equal_a_teacher_forced_pass(requests: list[Expansion], dtype: str, tolerance: float) -> None:
    policy = load_policy(ModelConfig(path=MODEL, device="cuda", dtype=dtype), None)
    answers = TransformersEngine(policy).propose(requests, SearchConfig(max_sentence_tokens=20))
    first = [siblings[0] for siblings in answers]
    forced = policy.teacher_forced([r.prompt for r in requests], [c.token_ids for c in first])
    for candidate, logprobs in zip(first, forced, strict=True):
        assert abs(float(logprobs.sum()) - candidate.logprob) < tolerance


def test_cuda_gives_the_same_tokens_as_the_cpu(requests: list[Expansion]) -> None:
    answers_by_device = [
        TransformersEngine(load_policy(ModelConfig(path=MODEL, device=device, dtype="float32"), None)).propose(
            requests, SearchConfig(max_sentence_tokens=20)
        )
        for device in ("cuda", "cpu")
    ]
    tokens = [[[c.token_ids for c in siblings] for siblings in answers] for answers in answers_by_device]
    assert tokens[0] == tokens[1]


def test_dpo_trains_in_bfloat16(requests: list[Expansion], tmp_path: Path) -> None:
    model = ModelConfig(path=MODEL, device="cuda")
    engine = TransformersEngine(load_policy(model, None))
    pairs = []
    for request, siblings in zip(requests, engine.propose(requests, SearchConfig(temperature=2.0)), strict=True):
        chosen, rejected = (
            Response(str(index), siblings[index].token_ids, siblings[index].logprob, siblings[index].text, 1, 0.0, True)
            for index in (0, 1)
        )
        pairs.append(Pair(request.prompt, 1, chosen, rejected))
    training = TrainingConfig.model_validate({"trl": {"per_device_train_batch_size": 4, "learning_rate": 1e-3}})
    result = train(
        write_pairs(pairs, tmp_path),
        model,
        training,
        previous=None,
        adapter=tmp_path / "adapter",
        work=tmp_path / "work",
        seed=0,
    )
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert float(result["log"][-1]["loss"]) < float(result["log"][0]["loss"]) + 0.1
