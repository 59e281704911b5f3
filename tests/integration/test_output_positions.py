"""Compute logits of response tokens alone, in passes within a budget of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from csr_vlm.core.records import Prompt
from csr_vlm.generation.self_check import logprobs_from_pixels
from csr_vlm.generation.shared_attention_check import _difference
from csr_vlm.models import policy as module
from csr_vlm.models.policy import Policy


@dataclass
class Recorded:
    """Hold the number of tokens of every pass, and of those that reach the output layer."""

    tokens: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)


@pytest.fixture
def recorded(policy: Policy) -> Iterator[Recorded]:
    found, model = Recorded(), policy.base_model
    hooks = [
        model.model.language_model.register_forward_hook(
            lambda _module, _args, output: found.tokens.append(output.last_hidden_state.shape[:2].numel())
        ),
        model.get_output_embeddings().register_forward_hook(
            lambda _module, _args, output: found.outputs.append(output.shape[:-1].numel())
        ),
    ]
    yield found
    for hook in hooks:
        hook.remove()


def test_teacher_forcing_keeps_to_its_budgets(
    policy: Policy, prompts: list[Prompt], recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = policy.tokenizer("There is a red boat. There is a dog.", add_special_tokens=False)["input_ids"]
    responses = [ids[: 3 + index] for index in range(8)]
    alone = [policy.teacher_forced([prompt], [ids])[0] for prompt, ids in zip(prompts, responses, strict=False)]
    recorded.tokens.clear()
    recorded.outputs.clear()
    monkeypatch.setattr(module, "MAX_TARGETS", 20)
    longest = max(len(policy.encode(prompt).input_ids) for prompt in prompts[:8]) + len(responses[-1])
    together = policy.teacher_forced(prompts[:8], responses, 2 * longest)
    for left, right in zip(together, alone, strict=True):
        assert torch.allclose(left, right, atol=1e-4)
    assert len(recorded.tokens) > 3
    assert max(recorded.tokens) <= 2 * longest
    assert sum(recorded.outputs) == sum(map(len, responses))
    assert max(recorded.outputs) <= 20


def test_the_self_checks_compute_no_logits_of_the_prompt(
    policy: Policy, prompts: list[Prompt], recorded: Recorded
) -> None:
    ids = policy.tokenizer("There is a red boat.", add_special_tokens=False)["input_ids"]
    expected = policy.teacher_forced(prompts[:1], [ids])[0]
    assert torch.allclose(logprobs_from_pixels(policy, prompts[0], ids), expected, atol=1e-4)
    assert recorded.outputs[-1] == len(ids) + 1
    assert _difference(policy, prompts[0]) < 1e-3
    assert recorded.outputs[-1] < 10
