"""Select engines, and check the requests and candidates of a streaming one; no engine runs here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from csr_vlm.config.load import resolve
from csr_vlm.config.schema import GenerationConfig, ModelConfig, RunConfig, SearchConfig
from csr_vlm.core.errors import CsrError, PromptError
from csr_vlm.core.records import Candidate, Expansion, Finish, Prompt
from csr_vlm.generation.engines import _image_options
from csr_vlm.generation.sampling import stream_key
from csr_vlm.generation.streaming import StreamingEngine, TokenChunk, TokenRequest
from csr_vlm.generation.vllm import engine_arguments, vllm_engine
from csr_vlm.generation.vllm_server import server_stream
from csr_vlm.models.encoding import PromptEncoder
from csr_vlm.models.loading import load_prompt_encoder
from csr_vlm.world.demo import assets

LLAVA = ModelConfig(path=str(assets() / "llava"), device="cpu")
VALID_OPTIONS = ["model", "dtype", "max_model_len", "max_num_seqs", "gpu_memory_utilization", "limit_mm_per_prompt"]
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
def test_options_that_vllm_does_not_support_are_rejected_by_the_configuration(
    changes: dict[str, object], complaint: str
) -> None:
    configured(**changes)
    for generation in ({"engine": "vllm"}, {"engine": "server", "server": "http://h:1"}):
        with pytest.raises(CsrError, match=complaint):
            configured(**changes, generation=generation)


def test_user_options_override_defaults_but_not_what_the_run_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    def arguments(**vllm: object) -> dict[str, object]:
        generation = GenerationConfig.model_validate({"engine": "vllm", "vllm": vllm, "max_rows": 7})
        return engine_arguments(LLAVA, generation, None, VALID_OPTIONS)

    assert arguments()["gpu_memory_utilization"] == 0.85
    assert arguments(gpu_memory_utilization=0.5)["gpu_memory_utilization"] == 0.5
    assert (arguments()["max_num_seqs"], arguments(max_num_seqs=9)["max_num_seqs"]) == (7, 9)
    assert (arguments()["dtype"], arguments()["logprobs_mode"]) == ("float32", "raw_logprobs")
    assert "enable_lora" not in arguments()
    assert arguments()["enable_chunked_prefill"] is False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    on_gpu = LLAVA.model_copy(update={"device": "cuda"})
    assert "enable_chunked_prefill" not in engine_arguments(
        on_gpu, GenerationConfig(engine="vllm"), None, VALID_OPTIONS
    )
    with pytest.raises(CsrError, match=r"did you mean max_model_len"):
        arguments(max_modellen=5)
    with pytest.raises(CsrError, match=r"generation.vllm.model is set by the run"):
        arguments(model="other")


def test_vllm_limits_pictures_as_the_processor_does() -> None:
    def options(max_image_tokens: int | None, **pictures: object) -> dict[str, object]:
        processor = SimpleNamespace(image_processor=SimpleNamespace(**pictures))
        encoder = SimpleNamespace(processor=processor, config=SimpleNamespace(model_type="toy"))
        return _image_options(configured(model={"path": "m", "max_image_tokens": max_image_tokens}), encoder)

    size = {"longest_edge": 784, "shortest_edge": None}
    assert options(None, size=size) == {}
    assert options(100, size=size) == {"size": {"longest_edge": 784}}
    assert options(100, size=size, max_patches=3) == {"max_patches": 3}
    with pytest.raises(CsrError, match="vLLM cannot limit"):
        options(100, size=size, image_grid_pinpoints=[[1, 2]])
    generation = GenerationConfig(engine="vllm")
    limited = engine_arguments(LLAVA, generation, None, VALID_OPTIONS, {"max_patches": 3})
    assert limited["mm_processor_kwargs"] == {"max_patches": 3}
    own = GenerationConfig(engine="vllm", vllm={"mm_processor_kwargs": {}})
    with pytest.raises(CsrError, match="set by the run"):
        engine_arguments(LLAVA, own, None, [*VALID_OPTIONS, "mm_processor_kwargs"], {"max_patches": 3})
    assert "mm_processor_kwargs" not in engine_arguments(LLAVA, generation, None, VALID_OPTIONS)


@pytest.mark.parametrize(("rank", "allowed"), [(1, 8), (8, 8), (9, 16), (128, 128)])
def test_the_maximum_lora_rank_fits_the_adapter(tmp_path: Path, rank: int, allowed: int) -> None:
    (tmp_path / "adapter_config.json").write_text(f'{{"r": {rank}}}')
    arguments = engine_arguments(LLAVA, GenerationConfig(engine="vllm"), tmp_path, VALID_OPTIONS)
    assert (arguments["enable_lora"], arguments["max_lora_rank"]) == (True, allowed)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CsrError, match="is not a LoRA adapter"):
        engine_arguments(LLAVA, GenerationConfig(engine="vllm"), tmp_path, VALID_OPTIONS)


def test_a_missing_vllm_has_a_hint_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    config = GenerationConfig(engine="vllm")
    with pytest.raises(CsrError, match="vllm is not installed") as caught, vllm_engine(LLAVA, config, None):
        pass
    assert "pip install 'vllm>=" in caught.value.hint


def test_an_error_names_the_server_that_does_not_respond(prompt_encoder: PromptEncoder) -> None:
    with (
        pytest.raises(CsrError, match="no response from"),
        server_stream("http://127.0.0.1:9", prompt_encoder, None, 2),
    ):
        pass


@pytest.fixture(scope="module")
def prompt_encoder() -> PromptEncoder:
    return load_prompt_encoder(LLAVA)


class ScriptedStream:
    """Stream given texts, one token per chunk, until they end or are aborted."""

    def __init__(self, prompt_encoder: PromptEncoder, *texts: str, broken_after: int | None = None) -> None:
        self._scripts = [prompt_encoder.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        self._broken_after = broken_after
        self._running: dict[str, tuple[list[int], int]] = {}
        self.requests: list[TokenRequest] = []
        self.aborted: list[str] = []
        self.released: list[str] = []

    def add(self, request: TokenRequest) -> None:
        self._running[request.request_id] = self._scripts[len(self.requests) % len(self._scripts)], 0
        self.requests.append(request)

    def next_chunks(self) -> list[TokenChunk]:
        chunks = []
        for request_id, (ids, index) in list(self._running.items()):
            is_last = index + 1 in (len(ids), self._broken_after)
            chunks.append(TokenChunk(request_id, [ids[index]], [-0.5 * (index + 1)], is_last))
            self._running[request_id] = ids, index + 1
            if is_last:
                del self._running[request_id]
        return chunks

    def abort(self, request_ids: Sequence[str]) -> None:
        self.aborted += request_ids

    def release(self, prompt_id: str) -> None:
        self.released.append(prompt_id)


def candidates_of(
    stream: ScriptedStream, prompt_encoder: PromptEncoder, config: SearchConfig, num_candidates: int = 1
) -> list[Candidate]:
    proposer = StreamingEngine(stream, prompt_encoder).proposer(config, PROMPT)
    proposer.submit([Expansion(PROMPT, "", (), num_candidates, (0, "p", 1, ""))])
    ((_, candidates),) = proposer.collect()
    proposer.release("p")
    return list(candidates)


def test_a_sentence_ends_at_its_delimiter_and_the_request_is_aborted(prompt_encoder: PromptEncoder) -> None:
    stream = ScriptedStream(prompt_encoder, " There is a red boat. There is a cup.")
    (candidate,) = candidates_of(stream, prompt_encoder, SearchConfig())
    ids = prompt_encoder.tokenizer(" There is a red boat.", add_special_tokens=False).input_ids
    assert (candidate.text, candidate.finish) == (" There is a red boat.", Finish.DELIMITER)
    assert candidate.token_ids == tuple(ids)
    assert candidate.token_logprobs == tuple(-0.5 * (index + 1) for index in range(len(ids)))
    assert stream.aborted == ["0"]
    assert stream.released == ["p"]


def test_a_period_inside_a_sentence_does_not_end_it(prompt_encoder: PromptEncoder) -> None:
    stream = ScriptedStream(prompt_encoder, " Ask Dr. Low. There")
    (candidate,) = candidates_of(stream, prompt_encoder, SearchConfig())
    assert candidate.text == " Ask Dr. Low."


def test_a_candidate_ends_with_the_response_or_at_its_token_limit(prompt_encoder: PromptEncoder) -> None:
    stream = ScriptedStream(prompt_encoder, " a red boat</s>", " a red boat and a red cup")
    config = SearchConfig(max_sentence_tokens=5)
    first, second = candidates_of(stream, prompt_encoder, config, num_candidates=2)
    assert (first.finish, first.token_ids[-1]) == (Finish.EOS, min(prompt_encoder.eos_ids))
    assert (second.finish, len(second.token_ids)) == (Finish.LENGTH, 5)


def test_an_engine_that_stops_early_is_an_error(prompt_encoder: PromptEncoder) -> None:
    with pytest.raises(CsrError, match="stopped a sentence of prompt p early, after 3 tokens"):
        candidates_of(
            ScriptedStream(prompt_encoder, " There is a red boat.", broken_after=3), prompt_encoder, SearchConfig()
        )


def test_the_sampling_parameters_of_each_request(prompt_encoder: PromptEncoder) -> None:
    stream = ScriptedStream(prompt_encoder, " There is a red boat. There")
    candidates_of(stream, prompt_encoder, SearchConfig(greedy_first=True, temperature=0.7, top_p=0.9), num_candidates=3)
    sampling = [request.sampling for request in stream.requests]
    assert [(s["temperature"], s["top_p"]) for s in sampling] == [(0.0, 1.0), (0.7, 0.9), (0.7, 0.9)]
    assert [s["seed"] for s in sampling] == [stream_key((0, "p", 1, "", index)) % 2**63 for index in range(3)]
    assert all(s["logit_bias"] == {prompt_encoder.image_token_ids[0]: -100.0} for s in sampling)
    assert all(s["stop_token_ids"] == sorted(prompt_encoder.eos_ids) for s in sampling)
    for request in stream.requests:
        assert request.token_ids.count(prompt_encoder.image_token_ids[0]) == 1


def test_a_search_that_failed_leaves_no_request_behind(prompt_encoder: PromptEncoder) -> None:
    stream = ScriptedStream(prompt_encoder, "There is a boat and a fish.", broken_after=2)
    engine = StreamingEngine(stream, prompt_encoder)
    proposer = engine.proposer(SearchConfig(), PROMPT)
    proposer.submit([Expansion(PROMPT, "", (), 3, (0, "p", 1, ""))])
    with pytest.raises(PromptError, match="stopped a sentence of prompt p early"):
        proposer.collect()
    engine.forget()
    assert set(stream.aborted) == {request.request_id for request in stream.requests}
    assert stream.released == ["p"]
    again = engine.proposer(SearchConfig(), PROMPT)
    again.submit([Expansion(PROMPT, "", (), 1, (0, "p", 1, ""))])
    assert stream.requests[-1].request_id not in stream.aborted, "ids are never used twice"
