"""Shared attention against the plain path, and what must not change whatever shares the batch."""

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
from csr_vlm.generation.decoding import Decoding, Writer
from csr_vlm.generation.scheduler import Scheduler
from csr_vlm.generation.shared_attention import Blocks, KVCache
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
def test_search_writes_what_the_plain_path_writes(
    policy: Policy, prompts: list[Prompt], scorer: ScorerGroup, name: str
) -> None:
    method = settings(**DECODINGS[name])
    found = {
        attention: ledger(TransformersEngine(policy, attention=attention), prompts[:6], method, scorer)
        for attention in ("plain", "shared")
    }
    assert same_tokens(found["plain"], found["shared"])
    assert len({node.depth for node in found["shared"].values()}) > 2
    for key, node in found["shared"].items():
        assert abs(node.logprob - found["plain"][key].logprob) < 1e-4
    other = ledger(TransformersEngine(policy), prompts[:6], settings(temperature=2.0), scorer)
    assert not same_tokens(found["shared"], other), "the test can fail"


def test_search_does_not_depend_on_rows_order_or_company(
    policy: Policy, prompts: list[Prompt], scorer: ScorerGroup
) -> None:
    method = settings()
    together = ledger(TransformersEngine(policy), prompts[:6], method, scorer)
    for max_rows, order in ((4, 1), (21, -1), (64, 1)):
        engine = TransformersEngine(policy, max_rows=max_rows, attention="shared")
        assert same_tokens(ledger(engine, prompts[:6][::order], method, scorer), together)
    alone = ledger(TransformersEngine(policy), prompts[2:3], method, scorer)
    assert same_tokens(alone, {key: node for key, node in together.items() if key[0] == prompts[2].prompt_id})


def test_nothing_is_read_or_seen_twice(policy: Policy, prompts: list[Prompt], scorer: ScorerGroup) -> None:
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
    writer = Writer(policy, Decoding.of(SearchConfig(max_sentence_tokens=20)))
    return Scheduler(SharedModel(policy, Counters()), writer, max_rows=max_rows, max_prompts=max_prompts)


def test_never_more_rows_or_prompts_than_allowed(
    policy: Policy, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = scheduler_of(policy, max_rows=10, max_prompts=2)
    rows, held = [], []
    choose = Writer.choose

    def counted(self: Writer, logits: torch.Tensor, live: Sequence[Any]) -> torch.Tensor:
        rows.append(len(live))
        held.append(len(scheduler._held))
        return choose(self, logits, live)

    monkeypatch.setattr(Writer, "choose", counted)
    scheduler.submit(expansions(prompts))
    answered = []
    while len(answered) < len(prompts):
        for request, candidates in scheduler.collect():
            answered.append(request.prompt.prompt_id)
            assert len(candidates) == 4
            scheduler.release(request.prompt.prompt_id)
    assert sorted(answered) == sorted(prompt.prompt_id for prompt in prompts)
    assert (max(rows), max(held)) == (8, 2)
    assert not scheduler._held
    assert not scheduler._prompts.owners
    assert not scheduler._families.owners


def test_storage_does_not_grow_with_prompts(policy: Policy, prompts: list[Prompt]) -> None:
    scheduler = scheduler_of(policy, max_rows=16, max_prompts=4)
    sizes = []
    for _ in range(3):
        waiting = {prompt.prompt_id for prompt in prompts}
        scheduler.submit(expansions(prompts))
        while waiting:
            for request, _ in scheduler.collect():
                waiting.remove(request.prompt.prompt_id)
                scheduler.release(request.prompt.prompt_id)
        sizes.append(scheduler._prompts.data.numel() + scheduler._families.data.numel())
    assert sizes[0] == sizes[1] == sizes[2]


def test_a_partial_response_from_elsewhere_is_read_again(policy: Policy, prompts: list[Prompt]) -> None:
    first = TransformersEngine(policy).propose(expansions(prompts), SearchConfig(max_sentence_tokens=20))
    prefixes = {p.prompt_id: family[0].token_ids for p, family in zip(prompts, first, strict=True)}
    requests = expansions(prompts, prefixes)
    found = [
        TransformersEngine(policy, attention=attention).propose(requests, SearchConfig(max_sentence_tokens=20))
        for attention in ("plain", "shared")
    ]
    assert tokens(found[0]) == tokens(found[1])


def test_what_cannot_share_falls_back_with_a_notice(
    policy: Policy, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SearchConfig(max_sentence_tokens=8)
    expected = tokens(TransformersEngine(policy, attention="plain").propose(expansions(prompts[:2]), config))
    # As if the model counted positions in a way that is not known.
    right = SharedModel.step
    monkeypatch.setattr(SharedModel, "step", lambda self, ids, positions, step: right(self, ids, positions + 7, step))
    said: list[str] = []
    engine = TransformersEngine(policy, notice=said.append)
    assert tokens(engine.propose(expansions(prompts[:2]), config)) == expected
    assert len(said) == 1
    assert "differ" in said[0]
    with pytest.raises(CsrError, match="shared attention"):
        TransformersEngine(policy, attention="shared").propose(expansions(prompts[:2]), config)


def test_a_model_whose_attention_raises_falls_back(
    policy: Policy, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise NotImplementedError("scores that are capped")

    monkeypatch.setattr(SharedModel, "step", broken)
    said: list[str] = []
    TransformersEngine(policy, notice=said.append).propose(expansions(prompts[:1]), SearchConfig(max_sentence_tokens=2))
    assert "scores that are capped" in said[0]


class Box:
    slot = -1


def test_a_shelf_closes_gaps_and_keeps_what_it_holds() -> None:
    shelf: KVCache[Box] = KVCache(8)
    boxes = [Box() for _ in range(5)]
    kept = [torch.full((2, 2, 3, length, 4), float(length)) for length in (3, 9, 5, 7, 2)]
    for box, kv in zip(boxes, kept, strict=True):
        shelf.put(box, kv)
    shelf.take(boxes[1])
    shelf.take(boxes[4])
    assert sorted(boxes[index].slot for index in (0, 2, 3)) == [0, 1, 2]
    for index in (0, 2, 3):
        assert torch.equal(shelf.of(boxes[index]), kept[index])
    assert shelf.layer(0)[0].shape == (3, 3, 7, 4)


def test_siblings_take_turns_in_a_block() -> None:
    # A path of two tokens, then two steps of two siblings: P P a b a b; another family has no path.
    # Prompts of ten and of four tokens; room for one token more.
    blocks = Blocks([10, 4], [2, 0], [2, 2], [6, 2], width=7, device=torch.device("cpu"))
    seen = [["".join("." if cell else "x" for cell in row) for row in family] for family in blocks.hidden(2).tolist()]
    assert seen == [["xxx.x..", "xx.x.x."], ["x......", ".x....."]]
    assert blocks.token_index()[:, :6].tolist() == [[10, 11, 12, 12, 13, 13], [4, 4, 5, 5, 6, 6]]
