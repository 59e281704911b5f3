"""Check the engine: log-probabilities, invariances, delimiters, diversity, and masked image tokens."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from csr_vlm.config.schema import SearchConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Candidate, Expansion, Finish, Prompt
from csr_vlm.generation import decoding, transformers_engine
from csr_vlm.generation.reading_ahead import ReadingAhead
from csr_vlm.generation.transformers_engine import TransformersEngine
from csr_vlm.models.encoding import PromptEncoder
from csr_vlm.models.policy import Policy

CONFIG = SearchConfig(max_sentence_tokens=20)


def expansions(prompts: Sequence[Prompt], prefixes: dict[str, tuple[int, ...]] | None = None) -> list[Expansion]:
    return [
        Expansion(p, "0" if prefixes else "", (prefixes or {}).get(p.prompt_id, ()), 4, (0, p.prompt_id, 1, ""))
        for p in prompts
    ]


def first_sentences(policy: Policy, prompts: Sequence[Prompt]) -> dict[str, tuple[int, ...]]:
    answers = TransformersEngine(policy).propose(expansions(prompts), CONFIG)
    return {p.prompt_id: siblings[0].token_ids for p, siblings in zip(prompts, answers, strict=True)}


def test_logprobs_equal_a_teacher_forced_pass(policy: Policy, prompts: list[Prompt]) -> None:
    prefixes = first_sentences(policy, prompts)
    answers = TransformersEngine(policy).propose(expansions(prompts, prefixes), CONFIG)
    other_image = [replace(p, image=q.image) for p, q in zip(prompts, [*prompts[1:], prompts[0]], strict=True)]
    wrong_image_differences = []
    for index in range(4):
        chosen = [siblings[index] for siblings in answers]
        full = [prefixes[p.prompt_id] + c.token_ids for p, c in zip(prompts, chosen, strict=True)]
        for inputs, is_right in ((prompts, True), (other_image, False)):
            for candidate, ids, logprobs in zip(chosen, full, policy.teacher_forced(inputs, full), strict=True):
                start = len(ids) - len(candidate.token_ids)
                difference = abs(float(logprobs[start:].sum()) - candidate.logprob)
                if is_right:
                    assert difference < 1e-4
                else:
                    wrong_image_differences.append(difference)
    assert np.median(wrong_image_differences) > 0.1


def tokens(answers: Sequence[Sequence[Candidate]]) -> list[list[tuple[int, ...]]]:
    return [[candidate.token_ids for candidate in siblings] for siblings in answers]


def test_tokens_do_not_depend_on_batch_size_order_or_other_prompts(policy: Policy, prompts: list[Prompt]) -> None:
    prefixes = first_sentences(policy, prompts)
    requests = expansions(prompts, prefixes)
    together = tokens(TransformersEngine(policy, max_rows=512).propose(requests, CONFIG))
    assert tokens(TransformersEngine(policy, max_rows=4).propose(requests, CONFIG)) == together
    assert tokens(TransformersEngine(policy).propose(requests[::-1], CONFIG))[::-1] == together
    assert tokens(TransformersEngine(policy).propose(requests[3:4], CONFIG)) == together[3:4]


def test_rows_are_chosen_from_the_free_memory_and_shrink(
    policy: Policy, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, log = expansions(prompts[:4]), list[str]()
    expected = tokens(TransformersEngine(policy).propose(requests, CONFIG))
    monkeypatch.setattr(transformers_engine, "available_memory", lambda _device: 150e6)
    engine = TransformersEngine(policy, warn=log.append)
    assert tokens(engine.propose(requests, CONFIG)) == expected
    (message,) = log
    rows = int(re.search(r"up to (\d+) rows", message)[1])
    assert CONFIG.num_candidates < rows < 512
    assert rows % CONFIG.num_candidates == 0
    engine.propose(requests, CONFIG)
    assert log == [message], "they are chosen once"
    assert engine.shrink() == rows // 2
    assert tokens(engine.propose(requests, CONFIG)) == expected
    assert engine.shrink() == rows // 4
    monkeypatch.setattr(transformers_engine, "available_memory", lambda _device: 500e6)
    TransformersEngine(policy, warn=log.append).propose(requests, CONFIG)
    assert int(re.search(r"up to (\d+) rows", log[-1])[1]) > rows


def test_pictures_are_read_while_the_model_decodes(
    policy: Policy, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = PromptEncoder.image

    def slow(self: PromptEncoder, prompt: Prompt) -> Any:
        time.sleep(0.02)
        return image(self, prompt)

    monkeypatch.setattr(PromptEncoder, "image", slow)
    requests, answers, seconds = expansions(prompts), [], []
    for ahead in (False, True):
        monkeypatch.setattr(TransformersEngine, "gains_from_more_prompts", ahead)
        engine = TransformersEngine(policy, max_rows=8 if ahead else 16, attention="shared")
        answers.append(engine.propose(requests, CONFIG))
        seconds.append(engine.counters.seconds_reading)
    assert tokens(answers[1]) == tokens(answers[0])
    assert seconds[0] > 0.02 * len(prompts)
    assert seconds[1] < 0.7 * seconds[0]


def test_a_picture_that_cannot_be_read_ahead_is_reported_when_it_is_needed(
    policy: Policy, prompts: list[Prompt]
) -> None:
    reading = ReadingAhead(policy)
    missing = replace(prompts[1], image="missing.png")
    reading.expect([prompts[0], missing, prompts[2]])
    (first,) = reading.encode([prompts[0]])
    expected = policy.encode(prompts[0])
    assert torch.equal(first.input_ids, expected.input_ids)
    assert all(torch.equal(first.per_image[key], value) for key, value in expected.per_image.items())
    with pytest.raises(CsrError, match=r"missing\.png"):
        reading.encode([missing])
    reading.forget()
    assert len(reading.encode(prompts[2:4])) == 2


def test_seed_and_sibling_index_change_the_sample(policy: Policy, prompts: list[Prompt]) -> None:
    config = SearchConfig(max_sentence_tokens=20, temperature=2.0)
    base = expansions(prompts)
    other = [replace(request, seed=(1, *request.seed[1:])) for request in base]
    engine = TransformersEngine(policy)
    first = tokens(engine.propose(base, config))
    assert first != tokens(engine.propose(other, config))
    assert any(len(set(siblings)) > 1 for siblings in first)


@pytest.mark.parametrize("attention", ["plain", "shared"])
def test_greedy_first_decodes_the_first_sibling_greedily_and_keeps_the_others(
    policy: Policy, prompts: list[Prompt], attention: Literal["plain", "shared"]
) -> None:
    drawn = SearchConfig(max_sentence_tokens=20, temperature=2.0)
    engine = TransformersEngine(policy, attention=attention)
    requests = expansions(prompts[:4])
    sampled = tokens(engine.propose(requests, drawn))
    greedy = tokens(engine.propose(requests, drawn.model_copy(update={"temperature": 1e-4})))
    mixed = tokens(engine.propose(requests, drawn.model_copy(update={"greedy_first": True})))
    assert [siblings[0] for siblings in mixed] == [siblings[0] for siblings in greedy]
    assert [siblings[1:] for siblings in mixed] == [siblings[1:] for siblings in sampled]
    assert mixed != sampled


def test_a_candidate_is_one_sentence(policy: Policy, prompts: list[Prompt]) -> None:
    for siblings in TransformersEngine(policy).propose(expansions(prompts), CONFIG):
        for candidate in siblings:
            assert candidate.finish is Finish.DELIMITER
            assert candidate.sentence.count(".") == 1
            assert candidate.sentence.endswith(".")
            assert policy.tokenizer.decode(list(candidate.token_ids)) == candidate.text


def script(monkeypatch: pytest.MonkeyPatch, ids: Sequence[int]) -> None:
    """Make the sampler produce exactly these tokens, one a step."""
    remaining = iter(ids)

    def scripted(logits: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.tensor([next(remaining)] * len(logits))

    monkeypatch.setattr(decoding, "sample", scripted)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" It costs 3.5 coins. There", " It costs 3.5 coins."),
        (" Ask Dr. Low about it. There", " Ask Dr. Low about it."),
        (" Well... it is here. There", " Well... it is here."),
        (' He said "look." There', ' He said "look."'),
        (" There are 3. There", " There are 3."),
    ],
)
def test_periods_that_do_not_end_a_sentence_are_skipped(
    policy: Policy, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch, text: str, expected: str
) -> None:
    ids = policy.tokenizer(text, add_special_tokens=False).input_ids
    script(monkeypatch, ids)
    request = replace(expansions(prompts)[0], num_candidates=1)
    config = SearchConfig(max_sentence_tokens=len(ids))
    candidate = TransformersEngine(policy).propose([request], config)[0][0]
    assert candidate.text == expected
    assert candidate.finish is Finish.DELIMITER
    assert len(candidate.token_logprobs) == len(candidate.token_ids) < len(ids)


def test_the_end_of_a_response_right_after_a_delimiter_belongs_to_the_next_node(
    policy: Policy, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    eos = min(policy.eos_ids)
    ids = policy.tokenizer(" There is a red boat.", add_special_tokens=False).input_ids
    script(monkeypatch, [*ids, eos])
    request = replace(expansions(prompts)[0], num_candidates=1)
    candidate = TransformersEngine(policy).propose([request], CONFIG)[0][0]
    assert (candidate.token_ids, candidate.finish) == (tuple(ids), Finish.DELIMITER)
    script(monkeypatch, [eos])
    ending = TransformersEngine(policy).propose([replace(request, prefix_ids=tuple(ids))], CONFIG)[0][0]
    assert (ending.token_ids, ending.sentence, ending.finish) == ((eos,), "", Finish.EOS)


def test_a_sentence_without_a_delimiter_stops_at_its_token_limit(
    policy: Policy, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    word = policy.tokenizer(" boat", add_special_tokens=False).input_ids
    script(monkeypatch, word * 5)
    request = replace(expansions(prompts)[0], num_candidates=1)
    candidate = TransformersEngine(policy).propose([request], SearchConfig(max_sentence_tokens=5))[0][0]
    assert (len(candidate.token_ids), candidate.finish) == (5, Finish.LENGTH)


def test_image_placeholders_are_never_chosen(policy: Policy, prompts: list[Prompt]) -> None:
    (image_token,) = policy.image_token_ids
    head = policy.base_model.lm_head

    def prefer_image(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        output[..., image_token] += 100.0
        return output

    handle = head.register_forward_hook(prefer_image)
    try:
        for config in (CONFIG, SearchConfig(max_sentence_tokens=8, decoding="diverse")):
            answers = TransformersEngine(policy).propose(expansions(prompts[:2]), config)
            assert all(image_token not in ids for siblings in tokens(answers) for ids in siblings)
            # Recorded log-probabilities are those of the raw distribution, without the mask.
            assert all(c.token_logprobs[0] < -50 for siblings in answers for c in siblings)
    finally:
        handle.remove()


def test_diverse_siblings_differ_and_record_unpenalized_logprobs(policy: Policy, prompts: list[Prompt]) -> None:
    config = SearchConfig(max_sentence_tokens=20, decoding="diverse", diversity_penalty=3.0)
    requests = expansions(prompts)
    answers = TransformersEngine(policy).propose(requests, config)
    same = TransformersEngine(policy).propose(
        requests, SearchConfig(max_sentence_tokens=20, decoding="diverse", diversity_penalty=0.0)
    )
    assert all(len(set(siblings)) > 1 for siblings in tokens(answers))
    assert all(len(set(siblings)) == 1 for siblings in tokens(same))
    for index in range(4):
        chosen = [siblings[index] for siblings in answers]
        forced = policy.teacher_forced(prompts, [c.token_ids for c in chosen])
        for candidate, logprobs in zip(chosen, forced, strict=True):
            assert abs(float(logprobs.sum()) - candidate.logprob) < 1e-4


def test_greedy_responses_equal_those_of_transformers_generate(policy: Policy, prompts: list[Prompt]) -> None:
    ours = TransformersEngine(policy).respond(prompts[:4], max_new_tokens=40)
    for prompt, response in zip(prompts[:4], ours, strict=True):
        inputs = policy.model_inputs([policy.encode(prompt)], [()], "left")
        del inputs["position_ids"]
        theirs = policy.model.generate(**inputs, max_new_tokens=40, do_sample=False)
        assert tuple(theirs[0, inputs["input_ids"].shape[1] :].tolist()) == response.token_ids
