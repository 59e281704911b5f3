"""Select engines, and check the requests and candidates of a streaming one; no engine runs here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from csr_vlm.config.load import load_config, resolve
from csr_vlm.config.schema import GenerationConfig, ModelConfig, RunConfig, SearchConfig
from csr_vlm.core.errors import CsrError, PromptError
from csr_vlm.core.records import Candidate, Expansion, Finish, Prompt
from csr_vlm.generation import engine_choice
from csr_vlm.generation.engine_choice import choose_engine, planned_engine
from csr_vlm.generation.engines import _image_options
from csr_vlm.generation.sampling import stream_key
from csr_vlm.generation.streaming import StreamingEngine, TokenChunk, TokenRequest
from csr_vlm.generation.vllm import engine_arguments, memory_options, vllm_engine
from csr_vlm.generation.vllm_server import server_command, server_stream
from csr_vlm.models.encoding import PromptEncoder
from csr_vlm.models.loading import load_prompt_encoder
from csr_vlm.pipeline.start import require_engine
from csr_vlm.store.run import Run
from csr_vlm.world.demo import assets

LLAVA = ModelConfig(path=str(assets() / "llava"), device="cpu")
VALID_OPTIONS = ["model", "dtype", "max_model_len", "max_num_seqs", "gpu_memory_utilization", "limit_mm_per_prompt"]
PROMPT = Prompt("p", "image.png", "Describe the image.")
MANY = torch.zeros(11_000_000, dtype=torch.uint8)
"""A processed picture of 11 MB."""


def configured(**changes: object) -> RunConfig:
    return resolve({"model": {"path": "m"}, "scorer": {"path": "s"}, "data": {"prompts": "d"}, **changes})


@pytest.mark.parametrize(
    ("generation", "complaint"),
    [
        ({"engine": "server"}, "address must be set together"),
        ({"server": "http://localhost:8000"}, "address must be set together"),
        ({"engine": "server", "server": "file:///etc/passwd"}, "generation.server"),
        ({"engine": "transformers", "vllm": {"enforce_eager": True}}, "no effect unless engine is vllm"),
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


def with_gpu(monkeypatch: pytest.MonkeyPatch, *supported: str) -> None:
    """Pretend that torch sees a GPU and that a vLLM is installed which supports these classes."""
    registry = SimpleNamespace(get_supported_archs=lambda: supported)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    monkeypatch.setattr("csr_vlm.generation.vllm.require_import", lambda *_: None)
    monkeypatch.setattr(engine_choice, "is_installed", lambda _name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def test_auto_takes_vllm_where_nothing_stands_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(model={"path": LLAVA.path})

    def reason(config: RunConfig = config, *, has_gpu: bool = True, processes: int = 1) -> str:
        choice = planned_engine(config, has_gpu=has_gpu, processes=processes)
        assert choice.name == "transformers"
        return choice.reason

    assert "GPU" in reason(has_gpu=False)
    assert reason() == "vLLM is not installed"
    with_gpu(monkeypatch, "OtherModel")
    assert "does not support Llava" in reason()
    with_gpu(monkeypatch, "LlavaForConditionalGeneration")
    assert planned_engine(config, has_gpu=True).name == "vllm"
    assert "diverse decoding" in reason(configured(preset="official"))
    assert "4 processes" in reason(processes=4)
    chosen = planned_engine(configured(generation={"engine": "transformers"}), has_gpu=True)
    assert chosen == ("transformers", "set by generation.engine")


def test_auto_falls_back_where_vllm_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(model={"path": LLAVA.path}, generation={"vllm": {"enforce_eager": True}})
    with_gpu(monkeypatch, "LlavaForConditionalGeneration")
    opened: list[RunConfig] = []

    def open_engine(config: RunConfig, *_: object) -> AbstractContextManager[None]:
        opened.append(config)
        if len(opened) > 1:
            raise CsrError("the engine tokenizes prompt p differently")
        return nullcontext()

    monkeypatch.setattr("csr_vlm.generation.engines.open_engine", open_engine)
    assert choose_engine(config, None, PROMPT, print, 1).name == "vllm"
    assert (opened[0].generation.engine, opened[0].generation.vllm) == ("vllm", {"enforce_eager": True})
    choice = choose_engine(config, None, PROMPT, print, 1)
    assert choice == ("transformers", "vLLM cannot be used: the engine tokenizes prompt p differently")
    assert config.with_engine("transformers").generation.vllm == {}


def test_a_run_keeps_the_engine_that_was_chosen(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", configured())
    assert run.settled().config.generation.engine == "transformers"
    run.mark_done(0, "engine", name="vllm", reason="it starts")
    assert run.settled().config.generation.engine == "vllm"
    old = Run.create(tmp_path / "old", configured(generation={"engine": "transformers", "max_rows": 512}))
    old.mark_done(0, "prompts")
    assert Run.create(tmp_path / "old", configured()).config.generation.engine == "transformers"


def test_vllm_gets_the_memory_that_is_left(prompt_encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(model={"path": LLAVA.path, "device": "cpu"})
    assert memory_options(config, prompt_encoder, PROMPT) == {"max_num_seqs": 512}
    monkeypatch.setattr("csr_vlm.generation.vllm.available_memory", lambda _device: 73e9)
    monkeypatch.setattr("csr_vlm.generation.vllm.total_memory", lambda _device: 80e9)
    monkeypatch.setattr(PromptEncoder, "process", lambda *_: {"input_ids": torch.zeros(1, 80), "pixel_values": MANY})
    chosen = memory_options(config, prompt_encoder, PROMPT)
    assert (chosen["gpu_memory_utilization"], chosen["max_num_seqs"]) == (0.87, 1024)
    assert chosen["mm_processor_cache_gb"] == 6, "2 x 1024 / 4 pictures of 11 MB"
    assert chosen["limit_mm_per_prompt"] == {"image": 1}
    few = configured(model={"path": LLAVA.path, "device": "cpu"}, generation={"max_rows": 8})
    assert memory_options(few, prompt_encoder, PROMPT)["max_num_seqs"] == 8
    generation = GenerationConfig(engine="vllm", vllm={"gpu_memory_utilization": 0.5})
    found = engine_arguments(LLAVA, generation, None, VALID_OPTIONS, chosen=chosen)
    assert (found["gpu_memory_utilization"], found["max_num_seqs"]) == (0.5, 1024)
    assert "mm_processor_cache_gb" not in found, "an option that this vLLM does not have"


def test_the_server_command_follows_from_the_recipe() -> None:
    root = Path(__file__).parents[2]
    command = server_command(load_config(root / "recipes" / "llava-1.5-7b.yaml"))
    assert f"    {command}\n    csr run recipes/llava-1.5-7b.yaml" in (root / "docs" / "engines.md").read_text()
    config = configured(generation={"engine": "server", "server": "http://127.0.0.1:9"})
    with pytest.raises(CsrError, match="no response from") as caught:
        require_engine(config)
    assert "vllm serve m --enable-scale-out --enable-lora --max-lora-rank 16" in caught.value.hint


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
