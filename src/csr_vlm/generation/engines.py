"""Select, start, check and stop the engine that generates.

To add an engine:

1. Write a class with the methods of :class:`Engine`. Its ``proposer`` returns a
   :class:`csr_vlm.method.search.Proposer`; each candidate that it answers with carries the token
   ids as sampled and their log-probabilities under the raw distribution (untempered, before any
   masking), since these serve as the DPO reference. Where the engine streams tokens of one
   sequence at a time, implement only :class:`csr_vlm.generation.streaming.TokenStream` and wrap
   it in :class:`csr_vlm.generation.streaming.StreamingEngine`, which detects sentence ends.
2. Write a context manager that starts it, checks it on ``example`` and stops it, and register it
   in ``_OPENERS`` under the name that ``generation.engine`` gets. Import optional libraries
   inside the function.
3. Add the name to :class:`csr_vlm.config.schema.GenerationConfig`.
4. Test it against teacher forcing as ``tests/vllm/test_search.py`` does: equal log-probabilities,
   greedy tokens equal to those of the transformers engine, and tokens that do not depend on the
   order or the number of requests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from csr_vlm.config.schema import RunConfig, SearchConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt
from csr_vlm.generation.half_precision import prepare_half_precision
from csr_vlm.generation.row_budget import rows_on_cpu
from csr_vlm.generation.self_check import self_check
from csr_vlm.generation.streaming import StreamingEngine, TokenStream
from csr_vlm.generation.transformers_engine import TransformersEngine
from csr_vlm.method.search import Proposer
from csr_vlm.models.encoding import PromptEncoder
from csr_vlm.models.image_tokens import image_limit_options
from csr_vlm.models.loading import load_policy, load_prompt_encoder


class Engine(Protocol):
    """Define what a search needs of an engine."""

    def proposer(self, config: SearchConfig, example: Prompt) -> Proposer:
        """Return a proposer of sentences for a search; ``example`` is one of its prompts."""
        ...

    def forget(self) -> None:
        """Drop cached images; called between work items."""
        ...

    @property
    def gains_from_more_prompts(self) -> bool:
        """Return whether prompts of several work items decode faster together."""
        ...

    def shrink(self) -> int | None:
        """Use less memory from now on; return the most rows decoded at once, or None if that is not possible."""
        ...


Opener = Callable[[RunConfig, Path | None, Prompt, Callable[[str], None]], AbstractContextManager[Engine]]
"""Start an engine; the arguments are those of :func:`open_engine`."""


def open_engine(
    config: RunConfig, adapter: Path | None, example: Prompt, warn: Callable[[str], None]
) -> AbstractContextManager[Engine]:
    """Start the engine that ``generation.engine`` names; leaving the context stops it.

    Args:
        config: Configuration of the run, in which ``auto`` has been replaced (:mod:`csr_vlm.generation.engine_choice`).
        adapter: LoRA adapter to generate with; None for the base model.
        example: Prompt that the engine is checked on before it is returned.
        warn: Called with messages that the user should see.

    Raises:
        CsrError: The engine does not start, or fails its check.
    """
    return _OPENERS[config.generation.engine](config, adapter, example, warn)


@contextmanager
def _open_transformers(
    config: RunConfig, adapter: Path | None, example: Prompt, warn: Callable[[str], None]
) -> Iterator[Engine]:
    policy = load_policy(config.model, adapter, config.data.max_image_pixels)
    self_check(policy, example)
    prepare_half_precision(policy, example, warn)
    yield TransformersEngine(policy, config.generation.max_rows, config.generation.attention, warn)


@contextmanager
def _open_vllm(
    config: RunConfig, adapter: Path | None, example: Prompt, warn: Callable[[str], None]
) -> Iterator[Engine]:
    prompt_encoder = load_prompt_encoder(config.model, config.data.max_image_pixels)
    from csr_vlm.generation.vllm import VllmStream, memory_options, vllm_engine

    image_options = _image_options(config, prompt_encoder)
    chosen = memory_options(config, prompt_encoder, example)
    rows = {**chosen, **config.generation.vllm}["max_num_seqs"]
    with vllm_engine(config.model, config.generation, adapter, image_options, chosen) as engine:
        yield _checked(VllmStream(engine, prompt_encoder, adapter), prompt_encoder, example, rows)


@contextmanager
def _open_server(
    config: RunConfig, adapter: Path | None, example: Prompt, warn: Callable[[str], None]
) -> Iterator[Engine]:
    prompt_encoder = load_prompt_encoder(config.model, config.data.max_image_pixels)
    from csr_vlm.generation.vllm_server import server_stream

    assert config.generation.server is not None
    if image_options := _image_options(config, prompt_encoder):
        warn(f"the server must limit pictures alike: start it with --mm-processor-kwargs '{json.dumps(image_options)}'")
    rows = rows_on_cpu(config.generation.max_rows)  # the server has limits of its own
    with server_stream(config.generation.server, prompt_encoder, adapter, rows) as stream:
        yield _checked(stream, prompt_encoder, example, rows)


def _image_options(config: RunConfig, prompt_encoder: PromptEncoder) -> dict[str, Any]:
    """Return the options by which vLLM limits the tokens of a picture as ``model.max_image_tokens`` does.

    Raises:
        CsrError: The limit is not an option of the image processor.
    """
    if config.model.max_image_tokens is None:
        return {}
    options = image_limit_options(prompt_encoder.processor)
    if not options:
        raise CsrError(
            f"vLLM cannot limit the tokens of a picture for model type {prompt_encoder.config.model_type!r}",
            "remove model.max_image_tokens, or set generation.engine=transformers",
        )
    return options


_OPENERS: Mapping[str, Opener] = {
    "transformers": _open_transformers,
    "vllm": _open_vllm,
    "server": _open_server,
}


def _checked(stream: TokenStream, prompt_encoder: PromptEncoder, example: Prompt, rows: int) -> StreamingEngine:
    engine = StreamingEngine(stream, prompt_encoder, rows)
    engine.check(example)
    return engine
