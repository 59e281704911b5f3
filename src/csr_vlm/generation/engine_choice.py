"""Choose the engine of a run whose ``generation.engine`` is ``auto``: vLLM where it can be used, else transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from csr_vlm.config.schema import ModelConfig, RunConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.installing import is_installed
from csr_vlm.core.records import Prompt


class EngineChoice(NamedTuple):
    """Hold an engine, and why it was chosen."""

    name: Literal["transformers", "vllm", "server"]
    reason: str


def planned_engine(config: RunConfig, *, has_gpu: bool, processes: int = 1) -> EngineChoice:
    """Return the engine that a run would use, as far as that can be said without starting it.

    Args:
        config: Settings of the run.
        has_gpu: Whether the run has a CUDA GPU.
        processes: Processes that share the run, each with a GPU of its own.
    """
    if config.generation.engine != "auto":
        return EngineChoice(config.generation.engine, "set by generation.engine")
    obstacle = _obstacle(config, has_gpu, processes)
    if obstacle is not None:
        return EngineChoice("transformers", obstacle)
    return EngineChoice("vllm", "vLLM is installed and supports the model")


def choose_engine(
    config: RunConfig, adapter: Path | None, example: Prompt, warn: Callable[[str], None], processes: int
) -> EngineChoice:
    """Return the engine of a run; vLLM is started once, to check how it reads a prompt.

    Args:
        config: Settings of the run.
        adapter: LoRA adapter that the search begins with; None for the base model.
        example: Prompt for the check.
        warn: Called with messages that the user should see.
        processes: Processes that share the run.
    """
    import torch

    from csr_vlm.generation.engines import open_engine
    from csr_vlm.models.devices import resolve_device

    has_gpu = torch.cuda.is_available() and resolve_device(config.model.device).startswith("cuda")
    planned = planned_engine(config, has_gpu=has_gpu, processes=processes)
    if config.generation.engine != "auto" or planned.name != "vllm":
        return planned
    try:
        with open_engine(config.with_engine("vllm"), adapter, example, warn):
            return EngineChoice("vllm", "it starts, and reads a prompt as training does")
    except CsrError as error:
        return EngineChoice("transformers", f"vLLM cannot be used: {error.message}")


def _obstacle(config: RunConfig, has_gpu: bool, processes: int) -> str | None:
    """Return why vLLM cannot be used; None if it can."""
    if not has_gpu:
        return "vLLM is used on CUDA GPUs alone"
    if config.vllm_obstacle is not None:
        return f"vLLM does not support {config.vllm_obstacle}"
    if processes > 1:
        return f"{processes} processes share the run, and vLLM has been tried in one alone"
    if not is_installed("vllm"):
        return "vLLM is not installed"
    return _model_obstacle(config.model)


def _model_obstacle(model: ModelConfig) -> str | None:
    """Return why vLLM cannot run a model; a configuration that is not on disk is left to vLLM."""
    from transformers import AutoConfig

    from csr_vlm.generation.vllm import import_vllm
    from csr_vlm.models.architecture import local_directory

    try:
        supported = set(import_vllm().ModelRegistry.get_supported_archs())
    except CsrError as error:
        return error.message
    directory = local_directory(model)
    if directory is None:
        return None
    names = AutoConfig.from_pretrained(directory, trust_remote_code=model.trust_remote_code).architectures or []
    return None if supported & set(names) else f"vLLM does not support {', '.join(names) or 'the model'}"
