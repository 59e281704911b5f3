"""Compare a running vLLM server with transformers: token ids in, token ids out."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from csr_vlm.config.schema import ModelConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Expansion, Prompt
from csr_vlm.generation.streaming import StreamingEngine
from csr_vlm.generation.transformers_engine import TransformersEngine
from csr_vlm.generation.vllm_server import server_stream
from csr_vlm.models.encoding import PromptEncoder
from csr_vlm.models.loading import load_policy
from csr_vlm.models.policy import Policy
from tests.vllm.test_search import DEFAULT, TOLERANCE, VARIED, differences, propose, searched, tokens

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def server(llava: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = (
        "--dtype float32 --enforce-eager --block-size 32 --no-enable-chunked-prefill --enable-lora --max-lora-rank 8 "
        f"--enable-scale-out --host 127.0.0.1 --port {port}"
    )
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", llava.path, *command.split()],
            env=os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 600
        while not responds(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def responds(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (URLError, OSError):
        return False


def test_a_search_over_the_server_is_exact_with_each_adapter(
    server: str, llava: ModelConfig, prompt_encoder: PromptEncoder, prompts: list[Prompt], adapters: dict[str, Path]
) -> None:
    for name in (None, "one", "other", None):
        adapter = None if name is None else adapters[name]
        with server_stream(server, prompt_encoder, adapter, max_rows=32) as stream:
            engine = StreamingEngine(stream, prompt_encoder)
            engine.check(prompts[0])
            trees = searched(engine, prompts[:4], DEFAULT)
        absolute = differences(load_policy(llava, adapter), trees, prompts[:4])
        print(f"\nadapter {name}: {len(absolute)} tokens, largest difference {absolute.max():.2g}")
        assert absolute.max() < TOLERANCE


def test_tokens_do_not_depend_on_the_number_of_concurrent_requests(
    server: str, prompt_encoder: PromptEncoder, policy: Policy, prompts: list[Prompt]
) -> None:
    config = VARIED.model_copy(update={"greedy_first": True})
    answers = []
    for max_rows in (1, 32):
        with server_stream(server, prompt_encoder, None, max_rows) as stream:
            answers.append(propose(StreamingEngine(stream, prompt_encoder), prompts, config))
    assert tokens(answers[0]) == tokens(answers[1])
    greedy = propose(TransformersEngine(policy), prompts, config)
    assert [siblings[0].token_ids for siblings in answers[0]] == [siblings[0].token_ids for siblings in greedy]


def test_server_errors_are_reported(
    server: str, prompt_encoder: PromptEncoder, prompts: list[Prompt], tmp_path: Path
) -> None:
    with server_stream(server, prompt_encoder, None, max_rows=2) as stream:
        proposer = StreamingEngine(stream, prompt_encoder).proposer(VARIED, prompts[0])
        proposer.submit([Expansion(prompts[0], "0", (5,) * 600, 1, (0,))])
        with pytest.raises(CsrError, match="/inference/v1/generate returned status 400"):
            proposer.collect()
    with pytest.raises(CsrError, match="no adapter in"), server_stream(server, prompt_encoder, tmp_path, 2):
        pass
    with (
        pytest.raises(CsrError, match="no response from"),
        server_stream("http://127.0.0.1:9", prompt_encoder, None, 2),
    ):
        pass
