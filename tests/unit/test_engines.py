"""Choosing an engine, and what one that streams is told and made of; no engine runs here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from csr_vlm.config.load import resolve
from csr_vlm.config.schema import GenerationConfig, ModelConfig, RunConfig, SearchConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Expansion, Finish, Prompt
from csr_vlm.generation.sampling import stream_key
from csr_vlm.generation.streaming import Asked, Piece, StreamingEngine
from csr_vlm.generation.vllm import engine_arguments, running
from csr_vlm.generation.vllm_server import connected
from csr_vlm.models.encoding import PromptEncoder
from csr_vlm.models.loading import load_prompt_encoder
from csr_vlm.world.demo import assets

LLAVA = ModelConfig(path=str(assets() / "llava"), device="cpu")
KNOWN = ["model", "dtype", "max_model_len", "max_num_seqs", "gpu_memory_utilization", "limit_mm_per_prompt"]
PROMPT = Prompt("p", "image.png", "Describe the image.")


def configured(**changes: object) -> RunConfig:
    return resolve({"model": {"path": "m"}, "scorer": {"path": "s"}, "data": {"prompts": "d"}, **changes})


@pytest.mark.parametrize(
    ("generation", "complaint"),
    [
        ({"engine": "server"}, "address must be set together"),
        ({"server": "http://localhost:8000"}, "address must be set together"),
        ({"engine": "server", "server": "file:///etc/passwd"}, "generation.server"),
        ({"vllm": {"enforce_eager": True}}, "no effect unless engine is vllm"),
    ],
)
def test_an_engine_and_its_options_go_together(generation: dict[str, object], complaint: str) -> None:
    with pytest.raises(CsrError, match=complaint):
        configured(generation=generation)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"preset": "official"}, "diverse decoding"),
        ({"model": {"path": "m", "quantization": "nf4"}}, "the quantization of training"),
        ({"training": {"projector_learning_rate": 1e-5}}, "a projector besides the LoRA"),
    ],
)
def test_what_vllm_cannot_do_is_refused_before_anything_runs(changes: dict[str, object], complaint: str) -> None:
    configured(**changes)
    for generation in ({"engine": "vllm"}, {"engine": "server", "server": "http://h:1"}):
        with pytest.raises(CsrError, match=complaint):
            configured(**changes, generation=generation)


def test_the_users_options_win_over_ours_and_not_over_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def arguments(**vllm: object) -> dict[str, object]:
        generation = GenerationConfig.model_validate({"engine": "vllm", "vllm": vllm, "max_rows": 7})
        return engine_arguments(LLAVA, generation, None, KNOWN)

    assert arguments()["gpu_memory_utilization"] == 0.85
    assert arguments(gpu_memory_utilization=0.5)["gpu_memory_utilization"] == 0.5
    assert (arguments()["max_num_seqs"], arguments(max_num_seqs=9)["max_num_seqs"]) == (7, 9)
    assert (arguments()["dtype"], arguments()["logprobs_mode"]) == ("float32", "raw_logprobs")
    assert "enable_lora" not in arguments()
    assert arguments()["enable_chunked_prefill"] is False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    on_gpu = LLAVA.model_copy(update={"device": "cuda"})
    assert "enable_chunked_prefill" not in engine_arguments(on_gpu, GenerationConfig(engine="vllm"), None, KNOWN)
    with pytest.raises(CsrError, match=r"did you mean max_model_len"):
        arguments(max_modellen=5)
    with pytest.raises(CsrError, match=r"generation.vllm.model is set by the run itself"):
        arguments(model="other")


@pytest.mark.parametrize(("rank", "allowed"), [(1, 8), (8, 8), (9, 16), (128, 128)])
def test_the_adapters_rank_is_made_room_for(tmp_path: Path, rank: int, allowed: int) -> None:
    (tmp_path / "adapter_config.json").write_text(f'{{"r": {rank}}}')
    found = engine_arguments(LLAVA, GenerationConfig(engine="vllm"), tmp_path, KNOWN)
    assert (found["enable_lora"], found["max_lora_rank"]) == (True, allowed)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CsrError, match="holds no LoRA"):
        engine_arguments(LLAVA, GenerationConfig(engine="vllm"), tmp_path, KNOWN)


def test_a_missing_vllm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(CsrError, match="needs vLLM") as caught, running(LLAVA, GenerationConfig(engine="vllm"), None):
        pass
    assert "csr-vlm[vllm]" in caught.value.hint


def test_a_server_that_is_not_there_is_named(prompt_encoder: PromptEncoder) -> None:
    with pytest.raises(CsrError, match="nothing answers"), connected("http://127.0.0.1:9", prompt_encoder, None, 2):
        pass


@pytest.fixture(scope="module")
def prompt_encoder() -> PromptEncoder:
    return load_prompt_encoder(LLAVA)


class Scripted:
    """A stream that writes given texts, a token a piece, and goes on until it is stopped."""

    def __init__(self, prompt_encoder: PromptEncoder, *texts: str, broken_after: int | None = None) -> None:
        self._scripts = [prompt_encoder.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        self._broken_after = broken_after
        self._running: dict[str, tuple[list[int], int]] = {}
        self.asked: list[Asked] = []
        self.stopped: list[str] = []
        self.forgotten: list[str] = []

    def start(self, asked: Asked) -> None:
        self._running[asked.key] = self._scripts[len(self.asked) % len(self._scripts)], 0
        self.asked.append(asked)

    def pieces(self) -> list[Piece]:
        found = []
        for key, (ids, place) in list(self._running.items()):
            ended = place + 1 in (len(ids), self._broken_after)
            found.append(Piece(key, [ids[place]], [-0.5 * (place + 1)], ended))
            self._running[key] = ids, place + 1
            if ended:
                del self._running[key]
        return found

    def stop(self, keys: Sequence[str]) -> None:
        self.stopped += keys

    def forget(self, prompt_id: str) -> None:
        self.forgotten.append(prompt_id)


def answered(stream: Scripted, prompt_encoder: PromptEncoder, config: SearchConfig, num_candidates: int = 1) -> list:
    proposer = StreamingEngine(stream, prompt_encoder).proposer(config, PROMPT)
    proposer.submit([Expansion(PROMPT, "", (), num_candidates, (0, "p", 1, ""))])
    ((_, candidates),) = proposer.collect()
    proposer.release("p")
    return list(candidates)


def test_a_sentence_is_cut_where_it_ends_and_its_engine_called_off(prompt_encoder: PromptEncoder) -> None:
    stream = Scripted(prompt_encoder, " There is a red boat. There is a cup.")
    (candidate,) = answered(stream, prompt_encoder, SearchConfig())
    ids = prompt_encoder.tokenizer(" There is a red boat.", add_special_tokens=False).input_ids
    assert (candidate.text, candidate.finish) == (" There is a red boat.", Finish.DELIMITER)
    assert candidate.token_ids == tuple(ids)
    assert candidate.token_logprobs == tuple(-0.5 * (place + 1) for place in range(len(ids)))
    assert stream.stopped == ["0"]
    assert stream.forgotten == ["p"]


def test_a_delimiter_that_ends_nothing_does_not_stop_the_engine(prompt_encoder: PromptEncoder) -> None:
    stream = Scripted(prompt_encoder, " Ask Dr. Low. There")
    (candidate,) = answered(stream, prompt_encoder, SearchConfig())
    assert candidate.text == " Ask Dr. Low."


def test_the_end_of_a_response_and_the_budget_end_a_candidate_by_themselves(prompt_encoder: PromptEncoder) -> None:
    stream = Scripted(prompt_encoder, " a red boat</s>", " a red boat and a red cup")
    config = SearchConfig(max_sentence_tokens=5)
    first, second = answered(stream, prompt_encoder, config, num_candidates=2)
    assert (first.finish, first.token_ids[-1]) == (Finish.EOS, min(prompt_encoder.eos_ids))
    assert (second.finish, len(second.token_ids)) == (Finish.LENGTH, 5)


def test_an_engine_that_breaks_off_is_an_error(prompt_encoder: PromptEncoder) -> None:
    with pytest.raises(CsrError, match="broke off a sentence of prompt p after 3 tokens"):
        answered(Scripted(prompt_encoder, " There is a red boat.", broken_after=3), prompt_encoder, SearchConfig())


def test_what_an_engine_is_asked_for(prompt_encoder: PromptEncoder) -> None:
    stream = Scripted(prompt_encoder, " There is a red boat. There")
    answered(stream, prompt_encoder, SearchConfig(greedy_first=True, temperature=0.7, top_p=0.9), num_candidates=3)
    sampling = [asked.sampling for asked in stream.asked]
    assert [(s["temperature"], s["top_p"]) for s in sampling] == [(0.0, 1.0), (0.7, 0.9), (0.7, 0.9)]
    assert [s["seed"] for s in sampling] == [stream_key((0, "p", 1, "", place)) % 2**63 for place in range(3)]
    assert all(s["logit_bias"] == {prompt_encoder.image_token_ids[0]: -100.0} for s in sampling)
    assert all(s["stop_token_ids"] == sorted(prompt_encoder.eos_ids) for s in sampling)
    for asked in stream.asked:
        assert asked.token_ids.count(prompt_encoder.image_token_ids[0]) == 1
