"""Stream tokens from a vLLM engine in this process.

vLLM batches continuously, computes a common prefix once and encodes an image once. Every request
carries the last iteration's adapter as a LoRA, named by its content: vLLM keeps separate cache
entries per adapter name, so no stale entry is ever used.
"""

from __future__ import annotations

import dataclasses
import difflib
import gc
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from csr_vlm.config.schema import GenerationConfig, ModelConfig, RunConfig
from csr_vlm.core.errors import CsrError, PromptError
from csr_vlm.core.installing import install_command, require_import
from csr_vlm.core.memory import available_memory, total_memory
from csr_vlm.core.records import Prompt
from csr_vlm.generation.row_budget import RowShape, row_budget, rows_on_cpu
from csr_vlm.generation.streaming import TokenChunk, TokenRequest
from csr_vlm.models.architecture import architecture_of
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
"""Environment variables to set before vLLM is imported, unless the user has set them."""

_DEFAULTS = {
    "gpu_memory_utilization": 0.85,  # where the free memory is not measured
    "max_model_len": -1,  # the model's own limit, or as much as fits
    "limit_mm_per_prompt": {"image": 1},
}

_BESIDE_BYTES = 3e9
"""Bytes of a GPU that vLLM leaves to what the scorer computes."""
_CACHE_GB = (4, 16)
"""Least and most gigabytes of main memory for processed pictures; vLLM's default is the least."""

_ON_CPU = {"enable_chunked_prefill": False}  # vLLM cannot rewind a CPU's random stream after a prompt chunk


class VllmStream:
    """Send requests to a running engine, with one adapter or none (a TokenStream).

    Raises:
        CsrError: vLLM rejects the adapter.
    """

    def __init__(self, engine: Any, prompt_encoder: PromptEncoder, adapter: Path | None = None) -> None:
        self._engine = engine
        self._images = PromptImages(prompt_encoder)
        self._lora = None if adapter is None else _lora_request(adapter)
        if self._lora is not None:
            try:
                engine.add_lora(self._lora)
            except Exception as error:
                raise CsrError(
                    f"vLLM rejects the adapter {adapter}: {_reason(error)}", "set generation.engine=transformers"
                ) from None

    def add(self, request: TokenRequest) -> None:
        """Start a request.

        Raises:
            CsrError: vLLM rejects it, for example because it is too long.
        """
        from vllm import SamplingParams
        from vllm.exceptions import VLLMError
        from vllm.sampling_params import RequestOutputKind

        uuid, image = self._images.load(request.prompt)
        prompt = {
            "prompt_token_ids": request.token_ids,
            "multi_modal_data": {"image": image},
            "multi_modal_uuids": {"image": [uuid]},
        }
        sampling = SamplingParams(**request.sampling, output_kind=RequestOutputKind.DELTA)
        try:
            self._engine.add_request(request.request_id, prompt, sampling, lora_request=self._lora)
        except (ValueError, VLLMError) as error:
            raise PromptError(
                f"vLLM rejects prompt {request.prompt.prompt_id}: {_reason(error)}",
                "generation.vllm accepts the arguments of vllm.EngineArgs, such as max_model_len",
            ) from None

    def next_chunks(self) -> list[TokenChunk]:
        """Run one step of the engine and return its tokens."""
        return [_chunk(output) for output in self._engine.step()]

    def abort(self, request_ids: Sequence[str]) -> None:
        """Abort requests."""
        self._engine.abort_request(list(request_ids))

    def release(self, prompt_id: str) -> None:
        """Drop a prompt's image."""
        self._images.release(prompt_id)


class PromptImages:
    """Cache the images of the prompts in progress, each with a digest of its file."""

    def __init__(self, prompt_encoder: PromptEncoder) -> None:
        self._prompt_encoder = prompt_encoder
        self._loaded: dict[str, tuple[str, Any]] = {}

    def load(self, prompt: Prompt) -> tuple[str, Any]:
        """Return the SHA-256 of a prompt's image file and the loaded image."""
        if prompt.prompt_id not in self._loaded:
            self._loaded[prompt.prompt_id] = sha256_of(Path(prompt.image)), self._prompt_encoder.image(prompt)
        return self._loaded[prompt.prompt_id]

    def release(self, prompt_id: str) -> None:
        """Drop a prompt's image."""
        self._loaded.pop(prompt_id, None)


def import_vllm() -> Any:
    """Import vLLM with the environment variables that it reads then, and return it.

    Raises:
        CsrError: It is not installed, or cannot be imported.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    require_import("generation.engine=vllm", "vllm", install_command("vllm"))
    import vllm

    return vllm


def require_vllm(model: ModelConfig, generation: GenerationConfig) -> None:
    """Verify that vLLM can be imported and accepts the options of ``generation.vllm``.

    Raises:
        CsrError: It cannot, or does not.
    """
    arguments = dataclasses.fields(import_vllm().EngineArgs)
    engine_arguments(model, generation, None, [field.name for field in arguments])


def memory_options(config: RunConfig, prompt_encoder: PromptEncoder, example: Prompt) -> dict[str, Any]:
    """Choose the options of vLLM that depend on memory: those of a GPU as it is now, with the scorer loaded.

    Args:
        config: Settings of the run; options that ``generation.vllm`` sets are chosen too, and have no effect.
        prompt_encoder: Processor of the model.
        example: Prompt whose length and picture are taken for those of all.

    Returns:
        Options of vllm.EngineArgs; on a CPU only ``max_num_seqs``.
    """
    device, rows = resolve_device(config.model.device), config.generation.max_rows
    free = available_memory(device)
    if free is None:
        return {"max_num_seqs": rows_on_cpu(rows)}
    total = total_memory(device)
    share = config.generation.vllm.get("gpu_memory_utilization") or _share(free - _BESIDE_BYTES, total)
    architecture, processed = architecture_of(prompt_encoder.config), prompt_encoder.process(example)
    value = 4.0 if resolve_dtype(config.model.dtype, device) == "float32" else 2.0
    search = config.method.search
    if rows == "auto":
        room = share * total - architecture.weight_bytes(value, nf4=False)
        rows = row_budget(room, RowShape.longest(search), processed["input_ids"].shape[1], architecture, value)
    tensors = [item for item in processed.values() if hasattr(item, "nbytes")]
    pictures = 2 * rows / search.num_candidates * sum(tensor.nbytes for tensor in tensors)
    least, most = _CACHE_GB
    # Frames of videos would take the place of candidates when vLLM measures its memory.
    limits = {"image": 1} | ({"video": 0} if getattr(prompt_encoder.config, "video_token_id", None) else {})
    return {
        "gpu_memory_utilization": share,
        "max_num_seqs": rows,
        "mm_processor_cache_gb": min(max(math.ceil(pictures / 1e9), least), most),
        "limit_mm_per_prompt": limits,
    }


def _share(wanted: float, total: int) -> float:
    """Return a part of the memory of a GPU as vLLM takes it, in hundredths."""
    return min(max(math.floor(100 * wanted / total) / 100, 0.1), 0.95)


def allowed_rank(rank: int) -> int:
    """Return the least ``max_lora_rank`` for adapters of a rank; vLLM accepts 8, 16, 32, ... 512.

    Example:
        >>> allowed_rank(4), allowed_rank(128), allowed_rank(129)
        (8, 128, 256)
    """
    return max(8, 1 << (rank - 1).bit_length())


@contextmanager
def vllm_engine(
    model: ModelConfig,
    generation: GenerationConfig,
    adapter: Path | None,
    image_options: Mapping[str, Any] = MappingProxyType({}),
    chosen: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[Any]:
    """Start vLLM's engine for a model; leaving the context stops it and frees its memory.

    Args:
        adapter: LoRA adapter to make room for; None for the base model.
        image_options: Options of the image processor that limit the tokens of a picture; may be empty.
        chosen: Options that :func:`memory_options` chose.

    Raises:
        CsrError: vLLM is not installed, an option is not valid, or vLLM does not start.
    """
    require_vllm(model, generation)
    from vllm import EngineArgs, LLMEngine
    from vllm.distributed import cleanup_dist_env_and_memory

    valid_options = [field.name for field in dataclasses.fields(EngineArgs)]
    arguments = engine_arguments(model, generation, adapter, valid_options, image_options, chosen)
    engine = None
    try:
        try:
            engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        except (ValueError, RuntimeError, OSError, AssertionError, NotImplementedError) as error:
            raise CsrError(
                f"vLLM does not start with {model.path}: {_reason(error)}",
                "generation.vllm accepts the arguments of vllm.EngineArgs",
            ) from None
        yield engine
    finally:
        if engine is not None:
            engine.engine_core.shutdown()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


def engine_arguments(
    model: ModelConfig,
    generation: GenerationConfig,
    adapter: Path | None,
    valid_options: Sequence[str],
    image_options: Mapping[str, Any] = MappingProxyType({}),
    chosen: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Build the arguments of vllm.EngineArgs: defaults, overridden by ``generation.vllm``, then by what the run needs.

    Args:
        valid_options: Names of the arguments that vllm.EngineArgs accepts.
        image_options: Options of the image processor that limit the tokens of a picture.
        chosen: Defaults that depend on memory; those that this vLLM does not have are left out.

    Raises:
        CsrError: ``generation.vllm`` has an argument that does not exist, or one that the run sets.
    """
    device = resolve_device(model.device)
    required: dict[str, Any] = {
        "model": model.path,
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "dtype": resolve_dtype(model.dtype, device),
        "enable_prefix_caching": True,
        "logprobs_mode": "raw_logprobs",
    }
    if image_options:
        required["mm_processor_kwargs"] = dict(image_options)
    if adapter is not None:
        required |= {"enable_lora": True, "max_lora_rank": allowed_rank(_rank(adapter))}
    for name in generation.vllm:
        if name not in valid_options:
            near = difflib.get_close_matches(name, valid_options, n=1)
            hint = f"did you mean {near[0]}?" if near else "generation.vllm accepts the arguments of vllm.EngineArgs"
            raise CsrError(f"generation.vllm.{name} is not a valid option", hint)
        if name in required:
            raise CsrError(f"generation.vllm.{name} is set by the run and cannot be changed", "remove it")
    defaults = {**_DEFAULTS, **(_ON_CPU if device == "cpu" else {}), "max_num_seqs": rows_on_cpu(generation.max_rows)}
    known = {name: value for name, value in chosen.items() if name in valid_options}
    return {**defaults, **known, **generation.vllm, **required}


def adapter_name(adapter: Path) -> str:
    """Return the SHA-256 of an adapter's weights, as its name.

    Raises:
        CsrError: The directory has no adapter weights.
    """
    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        raise CsrError(f"there is no adapter in {adapter}", "the directory must contain adapter_model.safetensors")
    return sha256_of(weights)


def _chunk(output: Any) -> TokenChunk:
    (delta,) = output.outputs
    tokens = zip(delta.token_ids, delta.logprobs or (), strict=True)
    logprobs = [by_token[token].logprob for token, by_token in tokens]
    return TokenChunk(output.request_id, delta.token_ids, logprobs, output.finished, output.prompt_token_ids)


def _lora_request(adapter: Path) -> Any:
    from vllm.lora.request import LoRARequest

    name = adapter_name(adapter)
    return LoRARequest(name, int(name[:7], 16) + 1, str(adapter.resolve()))


def _rank(adapter: Path) -> int:
    try:
        rank: int = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CsrError(f"{adapter} is not a LoRA adapter", "set generation.engine=transformers") from None
    return rank


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
