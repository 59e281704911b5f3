"""vLLM in this process, as a stream of tokens.

vLLM batches continuously, computes a shared prefix once and encodes an image once. The last
iteration's adapter goes along with every request as a LoRA, named by its content: vLLM's
caches tell requests with different adapters apart, so nothing stale is ever read.
"""

from __future__ import annotations

import dataclasses
import difflib
import gc
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from csr_vlm.config.schema import GenerationConfig, ModelConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt
from csr_vlm.generation.streaming import Asked, Piece
from csr_vlm.models.devices import resolve_device, resolve_dtype
from csr_vlm.models.encoding import PromptEncoder
from csr_vlm.store.files import sha256_of

_ENVIRONMENT = {
    # An engine in a process of its own would outlive a killed run.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Set unless the user has set them, before vLLM is imported."""

_DEFAULTS = {
    "gpu_memory_utilization": 0.85,  # the scorer is on the same device
    "max_model_len": -1,  # the model's own, or as much as fits
    "limit_mm_per_prompt": {"image": 1},
}

_ON_CPU = {"enable_chunked_prefill": False}  # vLLM cannot rewind a CPU's random stream after a part of a prompt


class VllmStream:
    """Requests to a running engine, with one adapter or none."""

    def __init__(self, engine: Any, prompt_encoder: PromptEncoder, adapter: Path | None = None) -> None:
        self._engine = engine
        self._images = Images(prompt_encoder)
        self._lora = None if adapter is None else _lora_request(adapter)
        if self._lora is not None:
            try:
                engine.add_lora(self._lora)
            except Exception as error:
                raise CsrError(
                    f"vLLM does not take the adapter {adapter}: {_reason(error)}", "generation.engine=transformers"
                ) from None

    def start(self, asked: Asked) -> None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMError
        from vllm.sampling_params import RequestOutputKind

        name, image = self._images.of(asked.prompt)
        prompt = {
            "prompt_token_ids": asked.token_ids,
            "multi_modal_data": {"image": image},
            "multi_modal_uuids": {"image": [name]},
        }
        sampling = SamplingParams(**asked.sampling, output_kind=RequestOutputKind.DELTA)
        try:
            self._engine.add_request(asked.key, prompt, sampling, lora_request=self._lora)
        except (ValueError, VLLMError) as error:
            raise CsrError(
                f"vLLM does not take prompt {asked.prompt.prompt_id}: {_reason(error)}",
                "generation.vllm takes vLLM's own options, max_model_len among them",
            ) from None

    def pieces(self) -> list[Piece]:
        return [_piece(output) for output in self._engine.step()]

    def stop(self, keys: Sequence[str]) -> None:
        self._engine.abort_request(list(keys))

    def forget(self, prompt_id: str) -> None:
        self._images.forget(prompt_id)


class Images:
    """Loaded images of the prompts in the making, and names for them that follow their content."""

    def __init__(self, prompt_encoder: PromptEncoder) -> None:
        self._reader = prompt_encoder
        self._loaded: dict[str, tuple[str, Any]] = {}

    def of(self, prompt: Prompt) -> tuple[str, Any]:
        """Give the name and the image."""
        if prompt.prompt_id not in self._loaded:
            self._loaded[prompt.prompt_id] = sha256_of(Path(prompt.image)), self._reader.image(prompt)
        return self._loaded[prompt.prompt_id]

    def forget(self, prompt_id: str) -> None:
        """Drop a prompt's image."""
        self._loaded.pop(prompt_id, None)


@contextmanager
def running(model: ModelConfig, generation: GenerationConfig, adapter: Path | None) -> Iterator[Any]:
    """Run vLLM's engine for a model, ready for an adapter if one is given; its memory is given back in the end.

    Raises:
        CsrError: vLLM is not installed, does not know an option, or does not start.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from vllm import EngineArgs, LLMEngine
        from vllm.distributed import cleanup_dist_env_and_memory
    except ImportError as error:
        raise CsrError(f"generation.engine=vllm needs vLLM: {_reason(error)}", "pip install 'csr-vlm[vllm]'") from None
    arguments = engine_arguments(model, generation, adapter, [field.name for field in dataclasses.fields(EngineArgs)])
    engine = None
    try:
        try:
            engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        except (ValueError, RuntimeError, OSError, AssertionError, NotImplementedError) as error:
            raise CsrError(
                f"vLLM does not start with {model.path}: {_reason(error)}", "generation.vllm takes vLLM's own options"
            ) from None
        yield engine
    finally:
        if engine is not None:
            engine.engine_core.shutdown()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


def engine_arguments(
    model: ModelConfig, generation: GenerationConfig, adapter: Path | None, known: Sequence[str]
) -> dict[str, Any]:
    """Build the arguments of vllm.EngineArgs: ours, under what the user passes, under what must be.

    Args:
        known: The arguments that there are.

    Raises:
        CsrError: The user passes something unknown, or something that the run sets.
    """
    device = resolve_device(model.device)
    needed: dict[str, Any] = {
        "model": model.path,
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "dtype": resolve_dtype(model.dtype, device),
        "enable_prefix_caching": True,
        "logprobs_mode": "raw_logprobs",
    }
    if adapter is not None:
        # vLLM takes 8, 16, 32, ... 512.
        needed |= {"enable_lora": True, "max_lora_rank": max(8, 1 << (_rank(adapter) - 1).bit_length())}
    for name in generation.vllm:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "it takes the arguments of vllm.EngineArgs"
            raise CsrError(f"unknown option generation.vllm.{name}", hint)
        if name in needed:
            raise CsrError(f"generation.vllm.{name} is set by the run itself", "leave it out")
    defaults = {**_DEFAULTS, **(_ON_CPU if device == "cpu" else {}), "max_num_seqs": generation.max_rows}
    return {**defaults, **generation.vllm, **needed}


def adapter_name(adapter: Path) -> str:
    """Name an adapter by its weights.

    Raises:
        CsrError: There is none.
    """
    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        raise CsrError(f"there is no adapter in {adapter}", "it holds adapter_model.safetensors")
    return sha256_of(weights)


def _piece(output: Any) -> Piece:
    (fresh,) = output.outputs
    at_each = zip(fresh.token_ids, fresh.logprobs or (), strict=True)
    logprobs = [choices[token].logprob for token, choices in at_each]
    return Piece(output.request_id, fresh.token_ids, logprobs, output.finished, output.prompt_token_ids)


def _lora_request(adapter: Path) -> Any:
    from vllm.lora.request import LoRARequest

    name = adapter_name(adapter)
    return LoRARequest(name, int(name[:7], 16) + 1, str(adapter.resolve()))


def _rank(adapter: Path) -> int:
    try:
        rank: int = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CsrError(f"{adapter} holds no LoRA", "generation.engine=transformers") from None
    return rank


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
