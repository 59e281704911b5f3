"""Compare shared attention with plain decoding, and check that results do not depend on the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from csr_vlm.config.schema import MethodConfig, SearchConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Node, Prompt
from csr_vlm.generation.counters import Counters
from csr_vlm.generation.decoding import DecodingSettings, TokenSampler
from csr_vlm.generation.scheduler import Scheduler
from csr_vlm.generation.shared_attention import KVCache, SiblingLayout
from csr_vlm.generation.shared_model import SharedModel
from csr_vlm.generation.transformers_engine import TransformersEngine
from csr_vlm.method.search import search
from csr_vlm.models.policy import Policy
from csr_vlm.scoring.scorer import ScorerGroup
from tests.integration.test_engine import expansions, tokens

DECODINGS = {
    "sampled": {},
    "hot, top-p": {"temperature": 1.5, "top_p": 0.8},
    "diverse": {"decoding": "diverse", "diversity_penalty": 3.0},
}


def settings(**changes: Any) -> MethodConfig:
    return MethodConfig.model_validate(
        {"search": {"max_sentence_tokens": 20, "max_sentences": 4, "temperature": 1.3, **changes}}
    )


def ledger(engine: TransformersEngine, prompts: Sequence[Prompt], method: MethodConfig, scorer: ScorerGroup) -> Any:
    trees = search(
        prompts,
        engine.proposer(method.search, prompts[0]),
        scorer.score,
        method,
        iteration=1,
        seed=0,
        scorer=scorer.name,
    )
    return {(node.prompt_id, node.node_id): node for tree in trees for node in tree.nodes}


def same_tokens(left: dict[Any, Node], right: dict[Any, Node]) -> bool:
    return {key: node.token_ids for key, node in left.items()} == {key: node.token_ids for key, node in right.items()}


@pytest.mark.parametrize("name", DECODINGS)
def test_shared_attention_and_plain_decoding_give_the_same_search(
    policy: Policy, prompts: list[Prompt], scorer: ScorerGroup, name: str
) -> None:
    method = settings(**DECODINGS[name])
    nodes = {
        attention: ledger(TransformersEngine(policy, attention=attention), prompts[:6], method, scorer)
        for attention in ("plain", "shared")
    }
    assert same_tokens(nodes["plain"], nodes["shared"])
    assert len({node.depth for node in nodes["shared"].values()}) > 2
    for key, node in nodes["shared"].items():
        assert abs(node.logprob - nodes["plain"][key].logprob) < 1e-4
    other = ledger(TransformersEngine(policy), prompts[:6], settings(temperature=2.0), scorer)
    assert not same_tokens(nodes["shared"], other), "the test must be able to fail"


def test_search_does_not_depend_on_the_number_of_rows_or_on_other_prompts(
    policy: Policy, prompts: list[Prompt], scorer: ScorerGroup
) -> None:
    method = settings()
    together = ledger(TransformersEngine(policy), prompts[:6], method, scorer)
    for max_rows, order in ((4, 1), (21, -1), (64, 1)):
        engine = TransformersEngine(policy, max_rows=max_rows, attention="shared")
        assert same_tokens(ledger(engine, prompts[:6][::order], method, scorer), together)
    alone = ledger(TransformersEngine(policy), prompts[2:3], method, scorer)
    assert same_tokens(alone, {key: node for key, node in together.items() if key[0] == prompts[2].prompt_id})


def test_no_image_and_no_token_is_processed_twice(policy: Policy, prompts: list[Prompt], scorer: ScorerGroup) -> None:
    engine = TransformersEngine(policy, max_rows=32, attention="shared")
    nodes = ledger(engine, prompts, settings(), scorer)
    asked_again = [replace(prompt, prompt_id=f"{prompt.prompt_id}-again") for prompt in prompts[:3]]
    assert engine.counters.vision_encodes == len(prompts)
    assert engine.counters.prefill_tokens == sum(len(policy.encode(prompt).input_ids) for prompt in prompts)
    # A sentence's last token is fed back only if another may follow: not at an end of response.
    most = sum(len(node.token_ids) for node in nodes.values())
    assert most - len(nodes) <= engine.counters.decode_tokens <= most
    both = [pair for prompt, again in zip(prompts[:3], asked_again, strict=True) for pair in (prompt, again)]
    engine = TransformersEngine(policy, attention="shared")
    engine.propose(expansions(both), SearchConfig(max_sentence_tokens=4))
    assert engine.counters.vision_encodes == 3


def scheduler_of(policy: Policy, max_rows: int, max_prompts: int) -> Scheduler:
    sampler = TokenSampler(policy, DecodingSettings.from_search(SearchConfig(max_sentence_tokens=20)))
    return Scheduler(SharedModel(policy, Counters()), sampler, max_rows=max_rows, max_prompts=max_prompts)


def test_rows_and_prompts_stay_within_their_limits(
    policy: Policy, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = scheduler_of(policy, max_rows=10, max_prompts=2)
    num_rows, num_prompts = [], []
    choose = TokenSampler.choose

    def counted(self: TokenSampler, logits: torch.Tensor, candidates: Sequence[Any]) -> torch.Tensor:
        num_rows.append(len(candidates))
        num_prompts.append(len(scheduler._active))
        return choose(self, logits, candidates)

    monkeypatch.setattr(TokenSampler, "choose", counted)
    scheduler.submit(expansions(prompts))
    answered = []
    while len(answered) < len(prompts):
        for request, candidates in scheduler.collect():
            answered.append(request.prompt.prompt_id)
            assert len(candidates) == 4
            scheduler.release(request.prompt.prompt_id)
    assert sorted(answered) == sorted(prompt.prompt_id for prompt in prompts)
    assert (max(num_rows), max(num_prompts)) == (8, 2)
    assert not scheduler._active
    assert not scheduler._prompt_cache.owners
    assert not scheduler._group_cache.owners


def test_caches_do_not_grow_with_the_number_of_prompts(policy: Policy, prompts: list[Prompt]) -> None:
    scheduler = scheduler_of(policy, max_rows=16, max_prompts=4)
    sizes = []
    for _ in range(3):
        waiting = {prompt.prompt_id for prompt in prompts}
        scheduler.submit(expansions(prompts))
        while waiting:
            for request, _ in scheduler.collect():
                waiting.remove(request.prompt.prompt_id)
                scheduler.release(request.prompt.prompt_id)
        sizes.append(scheduler._prompt_cache.data.numel() + scheduler._group_cache.data.numel())
    assert sizes[0] == sizes[1] == sizes[2]


def test_a_partial_response_that_is_not_cached_is_prefilled(policy: Policy, prompts: list[Prompt]) -> None:
    first = TransformersEngine(policy).propose(expansions(prompts), SearchConfig(max_sentence_tokens=20))
    prefixes = {p.prompt_id: siblings[0].token_ids for p, siblings in zip(prompts, first, strict=True)}
    requests = expansions(prompts, prefixes)
    plain, shared = (
        TransformersEngine(policy, attention=attention).propose(requests, SearchConfig(max_sentence_tokens=20))
        for attention in ("plain", "shared")
    )
    assert tokens(plain) == tokens(shared)


def test_a_model_that_fails_the_check_falls_back_with_a_warning(
    policy: Policy, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SearchConfig(max_sentence_tokens=8)
    expected = tokens(TransformersEngine(policy, attention="plain").propose(expansions(prompts[:2]), config))
    # As if the model counted positions in an unknown way.
    decode = SharedModel.decode
    monkeypatch.setattr(
        SharedModel, "decode", lambda self, ids, positions, step: decode(self, ids, positions + 7, step)
    )
    warnings: list[str] = []
    engine = TransformersEngine(policy, warn=warnings.append)
    assert tokens(engine.propose(expansions(prompts[:2]), config)) == expected
    assert len(warnings) == 1
    assert "log-probabilities differ" in warnings[0]
    with pytest.raises(CsrError, match="does not support shared attention"):
        TransformersEngine(policy, attention="shared").propose(expansions(prompts[:2]), config)


def test_a_model_whose_attention_raises_falls_back(
    policy: Policy, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise NotImplementedError("capped scores")

    monkeypatch.setattr(SharedModel, "decode", broken)
    warnings: list[str] = []
    engine = TransformersEngine(policy, warn=warnings.append)
    engine.propose(expansions(prompts[:1]), SearchConfig(max_sentence_tokens=2))
    assert "NotImplementedError: capped scores" in warnings[0]


class Owner:
    slot = -1


def test_a_cache_closes_gaps_and_keeps_its_content() -> None:
    cache: KVCache[Owner] = KVCache(8)
    owners = [Owner() for _ in range(5)]
    stored = [torch.full((2, 2, 3, length, 4), float(length)) for length in (3, 9, 5, 7, 2)]
    for owner, kv in zip(owners, stored, strict=True):
        cache.insert(owner, kv)
    cache.remove(owners[1])
    cache.remove(owners[4])
    assert sorted(owners[index].slot for index in (0, 2, 3)) == [0, 1, 2]
    for index in (0, 2, 3):
        assert torch.equal(cache.read(owners[index]), stored[index])
    assert cache.layer(0)[0].shape == (3, 3, 7, 4)


def test_siblings_take_turns_in_a_block() -> None:
    # A path of two tokens, then two steps of two siblings: P P a b a b; another group has no path.
    # Prompts of ten and of four tokens; capacity for one token more.
    layout = SiblingLayout([10, 4], [2, 0], [2, 2], [6, 2], width=7, device=torch.device("cpu"))
    visible = [["".join("." if cell else "x" for cell in row) for row in group] for group in layout.mask(2).tolist()]
    assert visible == [["xxx.x..", "xx.x.x."], ["x......", ".x....."]]
    assert layout.token_index()[:, :6].tolist() == [[10, 11, 12, 12, 13, 13], [4, 4, 5, 5, 6, 6]]
