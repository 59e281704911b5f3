"""Which engine generates: chosen, started, tried on a prompt and stopped in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from csr_vlm.config.schema import RunConfig, SearchConfig
from csr_vlm.core.records import Prompt
from csr_vlm.generation.self_check import self_check
from csr_vlm.generation.streaming import StreamingEngine
from csr_vlm.generation.transformers_engine import TransformersEngine
from csr_vlm.method.search import Proposer
from csr_vlm.models.loading import load_policy, load_prompt_encoder


class Engine(Protocol):
    """What a search needs of an engine."""

    def proposer(self, config: SearchConfig, example: Prompt) -> Proposer:
        """Give what a search asks for sentences; ``example`` is a prompt that it will ask about."""
        ...

    def forget(self) -> None:
        """Drop what is kept about images; call it between work items."""
        ...


@contextmanager
def open_engine(
    config: RunConfig, adapter: Path | None, example: Prompt, notice: Callable[[str], None]
) -> Iterator[Engine]:
    """Start the engine that the configuration names, with an adapter on the model or none.

    Args:
        example: A prompt that the engine must handle as it should before it is given out.
        notice: Called with what the user should know.

    Raises:
        CsrError: It does not start, or does not do as it should.
    """
    pixels, generation = config.data.max_image_pixels, config.generation
    if generation.engine == "transformers":
        policy = load_policy(config.model, adapter, pixels)
        self_check(policy, example)
        yield TransformersEngine(policy, generation.max_rows, generation.attention, notice)
        return
    prompt_encoder = load_prompt_encoder(config.model, pixels)
    if generation.engine == "vllm":
        from csr_vlm.generation.vllm import VllmStream, running

        with running(config.model, generation, adapter) as vllm:
            engine = StreamingEngine(VllmStream(vllm, prompt_encoder, adapter), prompt_encoder)
            engine.check(example)
            yield engine
    else:
        from csr_vlm.generation.vllm_server import connected

        assert generation.server is not None
        with connected(generation.server, prompt_encoder, adapter, generation.max_rows) as stream:
            engine = StreamingEngine(stream, prompt_encoder)
            engine.check(example)
            yield engine
