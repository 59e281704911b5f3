"""Compare shared attention with plain attention in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from csr_vlm.config.schema import ModelConfig, SearchConfig
from csr_vlm.core.records import Expansion, Prompt
from csr_vlm.generation.transformers_engine import TransformersEngine
from csr_vlm.models.loading import load_policy
from tests.families.checkpoints import FAMILIES, checkpoint

TOLERANCE = 1e-4
"""Nats per sentence of at most twelve tokens."""


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_shared_attention_equals_plain_attention(name: str, tmp_path: Path) -> None:
    try:
        config = ModelConfig(path=str(checkpoint(name)), device="cpu")
    except ImportError as error:
        pytest.skip(f"the processor cannot be built here: {str(error).strip().splitlines()[0]}")
    policy = load_policy(config, None)
    # Different sizes, so that prompts differ in tiles and tokens.
    for number, size in enumerate(((72, 72), (90, 48))):
        Image.effect_noise(size, 80.0).convert("RGB").save(tmp_path / f"{number}.png")
    prompts = [Prompt(str(number), str(tmp_path / f"{number}.png"), "What is here?") for number in range(2)]
    requests = [Expansion(prompt, "", (), 3, (0, prompt.prompt_id, "")) for prompt in prompts]
    settings = SearchConfig(max_sentence_tokens=12)
    plain = TransformersEngine(policy, attention="plain").propose(requests, settings)
    engine = TransformersEngine(policy, attention="shared")
    shared = engine.propose(requests, settings)
    differing = []
    for groups in zip(plain, shared, strict=True):
        for left, right in zip(*groups, strict=True):
            if left.token_ids == right.token_ids:
                assert abs(left.logprob - right.logprob) < TOLERANCE
            else:
                differing.append(next((a, b) for a, b in zip(left.token_ids, right.token_ids, strict=False) if a != b))
    # A draw that falls on the border of two neighboring tokens may be rounded to either, once in thousands of draws.
    assert len(differing) <= 1
    assert all(abs(a - b) == 1 for a, b in differing)
    assert engine.counters.prefill_tokens == sum(len(policy.encode(prompt).input_ids) for prompt in prompts)
