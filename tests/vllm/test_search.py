"""Compare vLLM with transformers: the same log-probabilities and, without sampling, the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csr_vlm.config.schema import MethodConfig, ModelConfig, ScorerConfig, SearchConfig, presets
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Candidate, Expansion, Prompt
from csr_vlm.generation.streaming import StreamingEngine
from csr_vlm.generation.transformers_engine import TransformersEngine
from csr_vlm.method.search import Tree, search
from csr_vlm.models.encoding import PromptEncoder
from csr_vlm.models.loading import load_policy
from csr_vlm.models.policy import Policy
from csr_vlm.scoring.registry import load_scorer
from csr_vlm.world.demo import assets

pytestmark = pytest.mark.vllm

DEFAULT = MethodConfig.model_validate(presets()["calibrated"]["method"])
VARIED = SearchConfig(max_sentence_tokens=20, temperature=2.0)
TOLERANCE = 1e-5


@pytest.fixture
def engine(vllm: Any, prompt_encoder: PromptEncoder) -> StreamingEngine:
    return streaming(vllm, prompt_encoder)


def streaming(vllm: Any, prompt_encoder: PromptEncoder, adapter: Path | None = None) -> StreamingEngine:
    from csr_vlm.generation.vllm import VllmStream

    return StreamingEngine(VllmStream(vllm, prompt_encoder, adapter), prompt_encoder)


def searched(engine: Any, prompts: Sequence[Prompt], method: MethodConfig) -> list[Tree]:
    scorer = load_scorer(ScorerConfig(path=str(assets() / "clip")), device="cpu")
    scorer.set_negative_images(prompts, 4)
    proposer = engine.proposer(method.search, prompts[0])
    return search(prompts, proposer, scorer.score, method, iteration=1, seed=0, scorer="clip")


def propose(engine: Any, prompts: Sequence[Prompt], config: SearchConfig, seed: int = 0) -> list[list[Candidate]]:
    requests = [Expansion(p, "", (), 4, (seed, p.prompt_id, 1, "")) for p in prompts]
    proposer = engine.proposer(config, prompts[0])
    proposer.submit(requests)
    by_prompt: dict[str, list[Candidate]] = {}
    while len(by_prompt) < len(requests):
        for request, candidates in proposer.collect():
            by_prompt[request.prompt.prompt_id] = list(candidates)
            proposer.release(request.prompt.prompt_id)
    return [by_prompt[p.prompt_id] for p in prompts]


def tokens(answers: Sequence[Sequence[Candidate]]) -> list[list[tuple[int, ...]]]:
    return [[candidate.token_ids for candidate in siblings] for siblings in answers]


def differences(policy: Policy, trees: Sequence[Tree], images: Sequence[Prompt]) -> np.ndarray:
    """Compute |recorded - teacher-forced| log-probability, in nats, of every token of every node on its path."""
    paths = [(image, tree.path(node.node_id)) for tree, image in zip(trees, images, strict=True) for node in tree.nodes]
    absolute: list[float] = []
    for start in range(0, len(paths), 64):
        chunk = paths[start : start + 64]
        responses = [tuple(token for node in path for token in node.token_ids) for _, path in chunk]
        forced = policy.teacher_forced([image for image, _ in chunk], responses)
        for (_, path), logprobs in zip(chunk, forced, strict=True):
            recorded = np.array(path[-1].token_logprobs)
            absolute += np.abs(recorded - logprobs[len(logprobs) - len(recorded) :].numpy()).tolist()
    return np.array(absolute)


def test_every_token_of_a_search_has_the_log_probability_of_a_teacher_forced_pass(
    engine: StreamingEngine, policy: Policy, prompts: list[Prompt]
) -> None:
    engine.check(prompts[0])
    trees = searched(engine, prompts, DEFAULT)
    assert max(node.depth for tree in trees for node in tree.nodes) > 2
    right = differences(policy, trees, prompts)
    print(f"\n{len(right)} tokens, largest difference {right.max():.2g}")
    assert len(right) > 500
    assert right.max() < TOLERANCE
    wrong_image = [replace(prompt, image=other.image) for prompt, other in pairwise([*prompts, prompts[0]])]
    assert differences(policy, trees, wrong_image).max() > 1


def test_a_greedy_search_gives_the_tokens_of_the_transformers_engine(
    engine: StreamingEngine, policy: Policy, prompts: list[Prompt]
) -> None:
    one = DEFAULT.search.model_copy(update={"num_candidates": 1, "keep_top": 1, "keep_bottom": 0})
    greedy = DEFAULT.model_copy(update={"search": one})
    ours = searched(engine, prompts, greedy)
    theirs = searched(TransformersEngine(policy), prompts, greedy)
    kept = [[(n.node_id, n.token_ids, n.text, n.finish, n.status) for n in tree.nodes] for tree in ours]
    assert kept == [[(n.node_id, n.token_ids, n.text, n.finish, n.status) for n in tree.nodes] for tree in theirs]
    assert max(len(nodes) for nodes in kept) > 2


def test_greedy_first_decodes_the_first_sibling_greedily_and_keeps_the_others(
    engine: StreamingEngine, policy: Policy, prompts: list[Prompt]
) -> None:
    sampled = tokens(propose(engine, prompts, VARIED))
    mixed = tokens(propose(engine, prompts, VARIED.model_copy(update={"greedy_first": True})))
    theirs = propose(TransformersEngine(policy), prompts, VARIED.model_copy(update={"greedy_first": True}))
    assert [siblings[0] for siblings in mixed] == [siblings[0].token_ids for siblings in theirs]
    assert [siblings[1:] for siblings in mixed] == [siblings[1:] for siblings in sampled]
    assert mixed != sampled


def test_tokens_do_not_depend_on_order_or_other_prompts(engine: StreamingEngine, prompts: list[Prompt]) -> None:
    together = propose(engine, prompts, VARIED)
    assert tokens(propose(engine, prompts[::-1], VARIED)[::-1]) == tokens(together)
    alone = [propose(engine, [prompt], VARIED)[0] for prompt in prompts]
    assert tokens(alone) == tokens(together)
    moved = [
        abs(x - y)
        for answers in zip(alone, together, strict=True)
        for a, b in zip(*answers, strict=True)
        for x, y in zip(a.token_logprobs, b.token_logprobs, strict=True)
    ]
    print(f"\nlog-probabilities alone and together differ by {max(moved):.2g}")
    assert max(moved) < TOLERANCE


def test_seed_and_sibling_index_change_the_sample(engine: StreamingEngine, prompts: list[Prompt]) -> None:
    first = tokens(propose(engine, prompts, VARIED))
    assert first == tokens(propose(engine, prompts, VARIED))
    assert first != tokens(propose(engine, prompts, VARIED, seed=1))
    assert any(len(set(siblings)) == 4 for siblings in first)


def test_sentences_occur_as_often_as_their_probability_predicts(engine: StreamingEngine, prompts: list[Prompt]) -> None:
    """At temperature 1 a sentence's frequency is the exponential of its recorded log-probability."""
    proposer = engine.proposer(SearchConfig(max_sentence_tokens=20), prompts[0])
    proposer.submit([Expansion(p, "", (), 64, (0, p.prompt_id)) for p in prompts])
    excess, variance, done = 0.0, 0.0, 0
    while done < len(prompts):
        for request, siblings in proposer.collect():
            first = siblings[0]
            probability = float(np.exp(first.logprob))
            excess += sum(c.token_ids == first.token_ids for c in siblings[1:]) - 63 * probability
            variance += 63 * probability * (1 - probability)
            proposer.release(request.prompt.prompt_id)
            done += 1
    assert variance > 10
    assert abs(excess) < 4 * np.sqrt(variance)


def test_an_image_is_encoded_once_for_all_candidates_of_all_rounds(
    vllm: Any, engine: StreamingEngine, prompts: list[Prompt]
) -> None:
    vllm.reset_prefix_cache()
    vllm.reset_mm_cache()
    vllm.reset_encoder_cache()
    encoded: list[int] = []

    def count(model: Any) -> Any:
        return model.vision_tower.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))

    (handle,) = vllm.apply_model(count)
    try:
        trees = searched(engine, prompts, DEFAULT)
    finally:
        handle.remove()
    assert sum(len(tree.nodes) for tree in trees) > 10 * len(prompts)
    assert sum(encoded) == len(prompts)


def test_image_placeholders_are_never_chosen_and_the_log_probabilities_stay_raw(
    vllm: Any, engine: StreamingEngine, prompt_encoder: PromptEncoder, prompts: list[Prompt]
) -> None:
    (image_token,) = prompt_encoder.image_token_ids
    originals: list[Any] = []

    def prefer_image(model: Any) -> None:
        originals.append(model.compute_logits)

        def changed(*args: Any, **kwargs: Any) -> Any:
            logits = originals[0](*args, **kwargs)
            logits[..., image_token] += 60.0
            return logits

        model.compute_logits = changed

    vllm.apply_model(prefer_image)
    try:
        answers = propose(engine, prompts[:2], SearchConfig(max_sentence_tokens=8, greedy_first=True))
    finally:
        vllm.apply_model(lambda model: setattr(model, "compute_logits", originals[0]))
    assert all(image_token not in ids for siblings in tokens(answers) for ids in siblings)
    assert all(c.token_logprobs[0] < -20 for siblings in answers for c in siblings)


def test_adapters_can_be_switched_without_stale_cache_entries(
    vllm: Any, llava: ModelConfig, prompt_encoder: PromptEncoder, adapters: dict[str, Path], prompts: list[Prompt]
) -> None:
    token_ids = {}
    for turn, name in enumerate((None, "one", "other", "one", None)):
        adapter = None if name is None else adapters[name]
        trees = searched(streaming(vllm, prompt_encoder, adapter), prompts[:4], DEFAULT)
        absolute = differences(load_policy(llava, adapter), trees, prompts[:4])
        print(f"\nadapter {name}: {len(absolute)} tokens, largest difference {absolute.max():.2g}")
        assert absolute.max() < TOLERANCE
        token_ids[turn] = [node.token_ids for tree in trees for node in tree.nodes]
    assert token_ids[0] == token_ids[4]
    assert token_ids[1] == token_ids[3]
    assert token_ids[0] != token_ids[1] != token_ids[2]


def test_an_adapter_with_a_projector_is_rejected(
    vllm: Any, prompt_encoder: PromptEncoder, adapters: dict[str, Path]
) -> None:
    with pytest.raises(CsrError, match="modules_to_save"):
        streaming(vllm, prompt_encoder, adapters["projector"])


def test_a_response_that_does_not_fit_is_an_error(engine: StreamingEngine, prompts: list[Prompt]) -> None:
    proposer = engine.proposer(SearchConfig(max_sentence_tokens=20), prompts[0])
    with pytest.raises(CsrError, match=f"prompt {prompts[0].prompt_id}"):
        proposer.submit([Expansion(prompts[0], "0", (5,) * 600, 1, (0,))])
