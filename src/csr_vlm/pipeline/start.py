"""Open everything that a run needs before the run begins, so that a start that cannot work leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from csr_vlm.config.schema import RunConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.hub import require_on_disk_or_reachable, require_reachable
from csr_vlm.core.installing import require_import
from csr_vlm.core.memory import free_memory
from csr_vlm.data.checking import ModelCheck
from csr_vlm.data.sources import is_hub_id, require_source


def require_start(config: RunConfig, log: Callable[[str], None]) -> ModelCheck:
    """Verify that model, scorer, engine and trackers of a run can be opened; nothing of them stays in memory.

    Returns:
        The check of prompts by the model's processor.

    Raises:
        CsrError: Something is missing or does not fit together.
    """
    from csr_vlm.models.prompt_check import ProcessorCheck
    from csr_vlm.pipeline.tasks import load_engine_and_scorer

    require_libraries(config)
    check = ProcessorCheck.of_run(config)
    adapter = None if config.model.adapter is None else Path(config.model.adapter)
    load_engine_and_scorer(config, adapter, log)
    free_memory()
    return check


def require_libraries(config: RunConfig, *, offline: bool = False) -> None:
    """Verify what needs no weights: arguments of the trainer, trackers, and the engine.

    Args:
        config: Configuration of the run.
        offline: Check the trainer's arguments alone; the run will happen on another machine.

    Raises:
        CsrError: An argument is invalid, a library is not installed, or the vLLM server does not respond.
    """
    from csr_vlm.training.dpo import check_arguments

    check_arguments(config.training)
    if not offline:
        require_trackers(config)
        require_engine(config)


def require_trackers(config: RunConfig) -> None:
    """Verify that the experiment trackers can be used.

    Raises:
        CsrError: A tracker is not supported, or its package is not installed.
    """
    for name in config.tracking.to:
        require_import("tracking.to", name, f"pip install {name}")
    if "report_to" in config.training.trl:
        from csr_vlm.training.reporting import require_services

        require_services(config.training.trl["report_to"])


def require_engine(config: RunConfig) -> None:
    """Verify that the engine is installed, or that the vLLM server responds.

    Raises:
        CsrError: It cannot be imported, or does not respond.
    """
    if config.generation.engine == "vllm":
        from csr_vlm.generation.vllm import require_vllm

        require_vllm(config.model, config.generation)
    if config.generation.engine == "server":
        from csr_vlm.generation.vllm_server import require_server

        require_server(config)


def require_sources(config: RunConfig) -> None:
    """Verify in seconds that what the run reads is on this disk, or that the hub responds.

    Raises:
        CsrError: Neither is the case.
    """
    require_on_disk_or_reachable("model.path", config.model.path, config.model.revision)
    for scorer in (config.scorer, *config.scorer.extra):
        if ":" not in scorer.path:
            require_on_disk_or_reachable("scorer.path", scorer.path, scorer.revision)
    for source in config.data.all_sources:
        require_source(source, "auto" if source == config.data.pairs else config.data.format)
        if is_hub_id(source):
            require_reachable("data.pairs" if source == config.data.pairs else "data.prompts", source)


def require_writable(root: Path) -> None:
    """Verify that a run directory can be created, or written to, without writing anything.

    Raises:
        CsrError: It cannot.
    """
    existing = next(path for path in (root, *root.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise CsrError(f"{existing} is a file, so {root} cannot be created", "choose another directory with --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CsrError(f"{existing} cannot be written to", "choose a writable directory with --out")
