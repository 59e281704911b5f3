"""Count what a decoding step launches on a pretended GPU, and run the branches for GPUs with real numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from csr_vlm.config.schema import SearchConfig
from csr_vlm.core.records import Candidate, Expansion, Finish, Prompt
from csr_vlm.generation import shared_attention
from csr_vlm.generation.counters import Counters
from csr_vlm.generation.decoding import PartialCandidate
from csr_vlm.generation.scheduler import Scheduler
from csr_vlm.generation.shared_attention import CacheView, KVCache, RowLayout, grid_of, padding_mask, to_device
from csr_vlm.generation.shared_model import Prefill, SharedModel
from csr_vlm.generation.transformers_engine import TransformersEngine
from csr_vlm.models.decoding_layers import use_fused_norms, use_plain_lora
from csr_vlm.models.policy import Policy
from tests.integration.test_engine import expansions, tokens
from tests.pretended import LaunchCounter

MOST_LAUNCHES = 52
"""Operations that a step may launch a layer; transformers' own eager layer alone needs 37."""
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 100}
HEAD_SIZE = SIZES["hidden_size"] // SIZES["num_attention_heads"]


class WithoutPrefill(SharedModel):
    """Decode with a model on the meta device; prompts get keys and values without numbers."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        policy: Any = SimpleNamespace(
            base_model=model,
            device=torch.device("meta"),
            reuses_features=False,
            encode=lambda prompt: SimpleNamespace(input_ids=range(60 + len(prompt.prompt_id))),
        )
        super().__init__(policy, Counters())
        self.per_step: list[Counter[str]] = []

    def prefill(self, encoded: Sequence[Any], prefixes: Sequence[Sequence[int]]) -> list[Prefill]:
        config, results = self.policy.base_model.config, []
        for item in encoded:
            shape = (config.num_hidden_layers, 2, config.num_key_value_heads, len(item.input_ids), HEAD_SIZE)
            kv = torch.empty(shape, dtype=torch.bfloat16, device="meta")
            hidden = torch.empty(config.hidden_size, dtype=torch.bfloat16, device="meta")
            results.append(Prefill(kv, hidden, len(item.input_ids)))
        return results

    def decode(self, *arguments: Any) -> torch.Tensor:
        with LaunchCounter() as counter:
            hidden_states = super().decode(*arguments)
        self.per_step.append(counter.launches)
        return hidden_states


class LengthSampler:
    """End sibling i of a sentence after 1 + i tokens."""

    def start(self, request: Expansion) -> list[PartialCandidate]:
        return [PartialCandidate(0, index, request.prefix_ids, np.empty(0)) for index in range(request.num_candidates)]

    def choose(self, logits: torch.Tensor, candidates: Sequence[PartialCandidate]) -> torch.Tensor:
        for candidate in candidates:
            if len(candidate.token_ids) == 1 + candidate.sibling_index:
                candidate.finish = Finish.DELIMITER
            else:
                candidate.token_ids.append(7)
        return torch.zeros(len(candidates), dtype=torch.long, device=logits.device)

    def completed(self, candidate: PartialCandidate) -> Candidate:
        return Candidate(tuple(candidate.token_ids), (), "", Finish.DELIMITER)


def launches(num_layers: int, *, adapter: str, fused_norms: bool = True) -> list[int]:
    """Decode two rounds of three prompts on the pretended GPU; return the launches of each step."""
    config = LlamaConfig(num_hidden_layers=num_layers, **SIZES)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    if fused_norms:
        use_fused_norms(model)
    get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", exclude_modules="lm_head"))
    if adapter == "plain":
        use_plain_lora(model, torch.bfloat16)
    shared = WithoutPrefill(model.to("meta"))
    scheduler = Scheduler(shared, LengthSampler(), max_rows=18, max_prompts=3)
    prompts = [Prompt(name, "", "") for name in ("a", "bb", "ccc")]
    scheduler.submit([Expansion(prompt, "", (), 3, ()) for prompt in prompts])
    answered = 0
    while answered < 2 * len(prompts):
        continued = []
        for request, siblings in scheduler.collect():
            answered += 1
            if not request.prefix_ids:
                continued.append(Expansion(request.prompt, "0", siblings[0].token_ids, 3, ()))
        scheduler.submit(continued)
    return [sum(step.values()) for step in shared.per_step]


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_attention, "EFFICIENT_DEVICES", {"meta"})


def per_layer(**settings: Any) -> set[int]:
    """Return the launches of one more layer, over all steps."""
    one, two = launches(1, **settings), launches(2, **settings)
    return {after - before for before, after in zip(one, two, strict=True)}


@pytest.mark.usefixtures("pretended_gpu")
def test_a_layer_and_step_launches_few_operations() -> None:
    # LoRA 14 beside 7 linear layers, norms 2, rotary 10, activation 2, residual 2; attention 14.
    assert per_layer(adapter="plain") == {51}
    assert max(per_layer(adapter="plain")) <= MOST_LAUNCHES
    # The count can fail: the adapter as PEFT computes it, and transformers' own norms.
    assert per_layer(adapter="peft") == {79}
    assert per_layer(adapter="plain", fused_norms=False) == {65}


def test_the_counter_notices_mixed_devices_and_host_reads() -> None:
    on_gpu = torch.zeros(3, device="meta")
    with LaunchCounter(), pytest.raises(RuntimeError, match="add has tensors on cpu and meta"):
        on_gpu + torch.zeros(3)
    for read in (lambda: bool(on_gpu[0] > 0), on_gpu.tolist, on_gpu.nonzero):
        with LaunchCounter(), pytest.raises((RuntimeError, NotImplementedError)):
            read()


@pytest.fixture
def efficient_attention_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Take the branches for GPUs on a CPU, with a stand-in for the CUDA kernel; yield the number of its calls."""
    calls = [0]

    def kernel(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        compute_log_sumexp: bool,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, ...]:
        calls[0] += 1
        assert compute_log_sumexp
        assert not is_causal
        assert scale is not None
        owners, heads, rows, size = query.shape
        assert key.shape == value.shape == (owners, heads, key.shape[2], size)
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        scores = scale * query @ key.transpose(-1, -2)
        if bias is not None:
            # What the CUDA kernel demands: full shape, the last dimension dense, rows aligned to 16 bytes.
            assert bias.shape == scores.shape
            assert bias.dtype == query.dtype
            assert bias.stride(-1) == 1
            assert all(stride % 8 == 0 for stride in bias.stride()[:-1])
            scores = scores + bias
        # As in CUDA: (owners, rows, heads, size) in memory, and a log-sum-exp that is padded to multiples of 32.
        output = torch.empty(owners, rows, heads, size, dtype=query.dtype).transpose(1, 2)
        output.copy_(scores.softmax(-1) @ value)
        log_sum_exp = torch.full((owners, heads, rows + -rows % 32), torch.nan)
        log_sum_exp[:, :, :rows] = scores.logsumexp(-1)
        return output, log_sum_exp, torch.empty(()), torch.empty(())

    monkeypatch.setattr(shared_attention, "is_gpu", lambda device: True)
    monkeypatch.setattr(shared_attention, "EFFICIENT_DEVICES", {"cpu"})
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_scaled_dot_product_efficient_attention", kernel, "CPU")
        yield calls


def test_the_branches_for_gpus_compute_the_same(
    policy: Policy, prompts: list[Prompt], efficient_attention_on_cpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, config = expansions(prompts[:5]), SearchConfig(max_sentence_tokens=20)
    engine = TransformersEngine(policy, max_rows=12, attention="shared")
    as_on_gpu = engine.propose(requests, config)
    prefixes = {request.prompt.prompt_id: a[0].token_ids for request, a in zip(requests, as_on_gpu, strict=True)}
    continued = engine.propose(expansions(prompts[:5], prefixes), config)
    assert efficient_attention_on_cpu[0] > 2 * policy.base_model.get_decoder().config.num_hidden_layers
    monkeypatch.undo()
    num_calls = efficient_attention_on_cpu[0]
    expected = TransformersEngine(policy, attention="plain")
    for found, requested in ((as_on_gpu, requests), (continued, expansions(prompts[:5], prefixes))):
        plain = expected.propose(requested, config)
        assert tokens(found) == tokens(plain)
        for left, right in zip(chain(*found), chain(*plain), strict=True):
            assert abs(left.logprob - right.logprob) < 1e-4
    assert efficient_attention_on_cpu[0] == num_calls


@pytest.mark.parametrize("as_on_gpu", [False, True])
def test_rows_attend_to_their_own_owner_only(as_on_gpu: bool, request: pytest.FixtureRequest) -> None:
    if as_on_gpu:
        request.getfixturevalue("efficient_attention_on_cpu")
    torch.manual_seed(0)
    owners, cpu = [Owner() for _ in range(3)], torch.device("cpu")
    cache: KVCache[Owner] = KVCache(3)
    for owner, length in zip(owners, (5, 3, 4), strict=True):
        cache.insert(owner, torch.randn(2, 2, 2, length, 8))  # two layers, two key heads
    # Owner 2 has the rows 0 and 3, owner 0 the rows 1, 4 and 5, owner 1 the row 2.
    *grid, shape = grid_of(np.array([2, 0, 1, 2, 0, 0]), np.array([0, 0, 0, 1, 1, 2]), 3)
    view = CacheView(cache, RowLayout(*to_device(grid, cpu), shape), padding_mask(cache.lengths, cache.width, cpu))
    query = torch.randn(6, 4, 8)  # four heads, two for each key head
    output, log_sum_exp = view.attend(1, query.view(-1, 8), 4, 0.3, view.bias(None, 4))
    for row, index in enumerate((2, 0, 1, 2, 0, 0)):
        keys, values = cache.read(owners[index])[1].repeat_interleave(2, dim=1)  # each (heads, tokens, size)
        scores = 0.3 * (keys @ query[row][..., None]).squeeze(-1)  # (heads, tokens)
        expected = (scores.softmax(-1)[:, None] @ values).squeeze(1)
        assert (output.view(6, 4, 8)[row] - expected).abs().max() < 1e-5
        assert (log_sum_exp.view(6, 4)[row] - scores.logsumexp(-1)).abs().max() < 1e-5


class Owner:
    slot = -1
